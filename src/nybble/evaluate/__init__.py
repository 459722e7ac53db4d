"""Measurements with one definition each."""
