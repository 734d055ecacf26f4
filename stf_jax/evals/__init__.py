"""Benchmarks, one file each, and the runner that asks their questions."""
