"""Adapters, one file each: what trains beside the frozen kernels of a model."""
