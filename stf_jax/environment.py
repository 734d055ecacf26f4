"""Prepares a command's process before libraries are imported: environment variables, device packages, logs."""

import contextlib
import glob
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator

TPUS = ("/dev/accel*", "/dev/vfio/[0-9]*")
_NVIDIA = ("/dev/nvidia*", "/dev/dxg", "/dev/nvhost*", "/dev/nvmap")  # NVIDIA GPUs; under WSL; Jetson
# Names in JAX_PLATFORMS, device files, and the packages by which jax finds the devices.
_DEVICES = (
    (("tpu",), TPUS, ("libtpu",)),
    (
        ("cuda", "gpu"),
        _NVIDIA,
        ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
    ),
)
_EMPTY_IS_UNSET = ("JAX_", "XLA_", "SLURM_", "OMPI_")
_EMPTY_IS_SET = ("JAX_PLATFORMS",)  # jax reads empty as "all available"; unset may mean fewer


def configure_process(*, compilers: bool) -> None:
    """Prepares the process for libraries that are imported later. Does not affect those already imported.

    - Removes empty variables of jax, XLA, SLURM and Open MPI, which jax cannot parse.
    - Keeps transformers from reading anything from the network.
    - Hides from jax the packages of devices that this machine lacks, unless ``JAX_PLATFORMS`` names them. jax would
      load them and print pages about missing devices: on a cluster's login node, or with the compilers of
      ``stf_jax.plan`` (requirements-plan.txt), which only that command uses.

    Args:
      compilers: hide no packages.
    """
    for name, value in list(os.environ.items()):
        if not value and name.startswith(_EMPTY_IS_UNSET) and name not in _EMPTY_IS_SET:
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not compilers and "jax" not in sys.modules:
        for package in unused_device_packages(os.environ.get("JAX_PLATFORMS", "")):
            hidden = _NoPlugin(package) if package.startswith("jax_plugins.") else None
            sys.modules[package] = hidden  # type: ignore[assignment]  # None is allowed, but not in the stubs


def unused_device_packages(platforms: str) -> list[str]:
    """Lists the packages of devices that this machine lacks and ``platforms`` (as ``JAX_PLATFORMS``) does not name."""
    named = set(platforms.split(","))
    absent = [device for device in _DEVICES if not named & set(device[0]) and not any(map(glob.glob, device[1]))]
    return [package for _, _, packages in absent for package in packages]


class _NoPlugin(types.ModuleType):
    """Takes the place of a hidden jax plugin, because jax warns about plugins that it cannot import."""

    def initialize(self) -> None:
        """Registers nothing."""


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Limits the logs of verbose libraries to errors. jax's warnings stay, because they are about devices."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logger = logging.getLogger("absl")  # used by Orbax, grain and TFDS
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def suppress_stderr() -> Iterator[None]:
    """Discards everything written to standard error, including by C++ libraries."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
