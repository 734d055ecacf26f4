"""The environment of a reader of the docs: a shell after ``. .venv/bin/activate``, without the tests' own settings."""

import os
import pathlib
import sys


def make_environment() -> dict[str, str]:
    """Returns the environment variables for commands of the docs, to be run in the project's folder."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PYTHON"))}
    return variables | {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"}
