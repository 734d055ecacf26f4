"""A reader's environment: what a shell has where ``. .venv/bin/activate`` was said, and nothing of the tests' own."""

import os
import pathlib
import sys


def environment() -> dict[str, str]:
    """Environment variables for commands of the docs; their working directory should be the project's folder."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PYTHON"))}
    return given | {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{given['PATH']}"}
