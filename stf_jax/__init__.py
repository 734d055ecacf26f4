"""STF-JAX: vision-language models with a quarter of the image tokens (LLaVA-STF, arXiv 2506.07138), in JAX.

    import stf_jax

    model = stf_jax.load("runs/demo/finetune")
    model.chat("photo.jpg", "How many shapes are there?")

Importing the package takes milliseconds, because its attributes are imported on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "Model": "api",
    "load": "api",
    "load_config": "api",
    "train": "api",
    "export": "api",
    "import_weights": "api",
    "Fusion": "models.fusions.base",
    "attention": "models.attention",
    "cross_entropy_sum": "training.loss",
    "Plan": "data.sampling",
}
__all__ = ["__version__", "evaluate", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # the module of the command, which is also callable as the function of that name
        return importlib.import_module(f"{__name__}.evaluate")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
