"""What every part stands on: pytrees, checks, numerics, types, compiling, identity, extras, origin."""
