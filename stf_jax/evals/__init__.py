"""Benchmarks, and the runner that asks their questions."""
