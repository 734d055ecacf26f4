"""The vision tower, the fusions, the language model, and the model made of them."""
