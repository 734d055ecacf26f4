"""Single files of lmms-eval, loaded without the many packages that importing all of it would take."""

import importlib.util
import pathlib
import sys
import types
from unittest import mock


def load(path: str) -> types.ModuleType:
    """A file below ``lmms_eval/tasks``; what it imports to log, ask servers and read tables with is a stand-in."""
    package = importlib.util.find_spec("lmms_eval")
    assert package is not None, "pip install --no-deps --requirement requirements-data.txt"
    file = pathlib.Path(package.submodule_search_locations[0]) / "tasks" / path
    spec = importlib.util.spec_from_file_location("their_" + path.replace("/", "_").removesuffix(".py"), file)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ("loguru", "pandas", "requests")}):
        spec.loader.exec_module(module)
    return module
