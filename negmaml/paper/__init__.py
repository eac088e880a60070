"""Reproduces the paper's figures and phase diagrams, and cross-checks all methods."""
