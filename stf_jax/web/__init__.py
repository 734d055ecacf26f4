"""A page to try a model in a browser."""
