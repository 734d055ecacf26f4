"""Measurements of the product, one file each (``python -m stf_jax.bench NAME``)."""
