"""What every part stands on: pytrees, checks, numerics, types, compilation, extras, provenance."""
