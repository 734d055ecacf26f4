"""Schedules of the image tokens that decoder layers read, one per file (base.py says what a schedule is)."""
