"""Data sources, one file each (base.py says what a data source is)."""
