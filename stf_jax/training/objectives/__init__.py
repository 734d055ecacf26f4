"""What training minimizes, one objective per file (base.py says what an objective is)."""
