"""Rates from your own grouped data."""
