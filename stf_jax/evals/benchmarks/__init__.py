"""Benchmarks, one file each (evals/benchmark.py says what a benchmark is)."""
