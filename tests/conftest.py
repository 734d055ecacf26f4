"""Eight simulated CPU devices for every test, set before jax wakes up."""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Test processes started by tests find the project and the tiny presets, wherever they run.
ROOT = pathlib.Path(__file__).parent.parent
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
