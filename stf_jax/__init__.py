"""STF-JAX: vision-language models that see with a quarter of the tokens (LLaVA-STF, arXiv 2506.07138), in JAX."""
