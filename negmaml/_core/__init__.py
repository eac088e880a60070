"""What every part stands on: pytrees, checks, numerics, compilation, extras, provenance, version."""
