"""Foundations of every other part: pytrees, checks, numbers, types, compiling, identity, extras."""
