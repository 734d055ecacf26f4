"""What a command's process finds around it, settled before libraries look: variables, packages of devices, logs."""

import contextlib
import glob
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator

TPUS = ("/dev/accel*", "/dev/vfio/[0-9]*")
_NVIDIA = ("/dev/nvidia*", "/dev/dxg", "/dev/nvhost*", "/dev/nvmap")  # NVIDIA's cards; under Windows; Jetson
# Names in JAX_PLATFORMS, the devices' files, and the packages by which jax finds them.
_DEVICES = (
    (("tpu",), TPUS, ("libtpu",)),
    (
        ("cuda", "gpu"),
        _NVIDIA,
        ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
    ),
)
_EMPTY_IS_UNSET = ("JAX_", "XLA_", "SLURM_", "OMPI_")
_EMPTY_IS_MEANT = ("JAX_PLATFORMS",)  # to jax, empty is "what is there", and unset may be less


def settle(*, compilers: bool) -> None:
    """Prepares a process for libraries that are imported later; what is imported already stays as it is.

    Empty variables of jax, XLA, SLURM and Open MPI count as unset (jax cannot read them). Nothing that transformers
    reads comes from the network. And jax does not see the packages of devices that this machine lacks, unless
    ``JAX_PLATFORMS`` names them: it would load them, and print pages about what it did not find. So it is on a
    cluster's login node, and with the compilers of ``stf_jax.plan`` (requirements-plan.txt), which that command alone
    wants.

    Args:
      compilers: jax is to see all packages.
    """
    for name, value in list(os.environ.items()):
        if not value and name.startswith(_EMPTY_IS_UNSET) and name not in _EMPTY_IS_MEANT:
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not compilers and "jax" not in sys.modules:
        for package in useless_packages(os.environ.get("JAX_PLATFORMS", "")):
            sys.modules[package] = _NoPlugin(package) if package.startswith("jax_plugins.") else None


def useless_packages(platforms: str) -> list[str]:
    """Packages of devices that are not here and that ``platforms`` (as ``JAX_PLATFORMS``) does not name."""
    named = set(platforms.split(","))
    absent = [kind for kind in _DEVICES if not named & set(kind[0]) and not any(map(glob.glob, kind[1]))]
    return [package for _, _, packages in absent for package in packages]


class _NoPlugin(types.ModuleType):
    """In a jax plugin's place, for jax warns of one that it cannot import."""

    def initialize(self) -> None:
        """Registers nothing."""


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Errors alone are heard from libraries that tell more; jax's warnings stay, for they are about devices."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logger = logging.getLogger("absl")  # Orbax's, grain's and TFDS's
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
def muted() -> Iterator[None]:
    """Nothing of the process reaches standard error, not even what libraries in C++ write."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
