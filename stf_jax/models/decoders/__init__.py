"""Language models: transformer.py computes them; each family has one file (base.py says what a family is)."""
