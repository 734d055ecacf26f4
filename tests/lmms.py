"""Loads single files of lmms-eval, without the many packages that all of lmms-eval needs."""

import importlib.util
import pathlib
import sys
import types
from typing import Any
from unittest import mock


def load_task_module(path: str) -> types.ModuleType:
    """Loads a file below ``lmms_eval/tasks``, with mocks for its imports for logging, HTTP and tables."""
    return load_module(f"tasks/{path}")


def load_module(path: str, **others: Any) -> types.ModuleType:
    """Loads a file below ``lmms_eval``, with ``others`` in place of other files of it, named with two underscores."""
    package = importlib.util.find_spec("lmms_eval")
    assert package is not None, "pip install --no-deps --requirement requirements-data.txt"
    file = pathlib.Path(package.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location("lmms_eval_" + path.replace("/", "_").removesuffix(".py"), file)
    module = importlib.util.module_from_spec(spec)
    stubs = {name: mock.MagicMock() for name in ("loguru", "pandas", "requests", "sacrebleu")}
    stubs |= {f"lmms_eval.{name.replace('__', '.')}": value for name, value in others.items()}
    with mock.patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    return module
