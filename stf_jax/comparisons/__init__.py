"""Compares results of methods, whoever evaluated them, with intervals, costs and hard questions."""
