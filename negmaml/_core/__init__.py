"""What every part stands on: pytrees, checks, numbers, types, compiling, identity, extras."""
