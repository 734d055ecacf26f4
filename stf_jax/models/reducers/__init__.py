"""Untrained token reducers, one file each (base.py says what a reducer is)."""
