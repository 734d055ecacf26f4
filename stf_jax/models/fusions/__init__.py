"""Token fusions, one file each (base.py says what a fusion is)."""
