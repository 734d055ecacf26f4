"""Abstract devices of a topology, for which the real compilers compile."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stf_jax.accounting.chips import CHIPS, Chip, find_chip
from stf_jax.config import UserError, did_you_mean, short_message
from stf_jax.environment import suppress_stderr

if TYPE_CHECKING:  # jax takes seconds to import, and checking names does not need it
    import jax

_INSTALL = "pip install --no-deps -r requirements-plan.txt"
# Packages and the modules they provide. jax checks the version of cuDNN before it uses its flash attention.
_COMPILERS = {
    "tpu": {"libtpu": "libtpu"},
    "gpu": {"jax-cuda12-pjrt": "jax_plugins.xla_cuda12", "nvidia-cudnn-cu12": "nvidia.cudnn"},
}
_TPUS = ("v4", "v5e", "v5p", "v6e")
# Memory (bytes, as the driver reports it), multiprocessors, clock (GHz); per multiprocessor FP32 units, shared memory
# (bytes), maximum shared memory per block (bytes) and threads; L2 (bytes), compute capability. Sources: NVIDIA's tuning
# guides and architecture whitepapers; memory and clock from OpenXLA's device descriptions, except those of Ada cards:
# memory from reports of such cards (21.96 and 23.52 GiB; an L4 keeps error correction in its memory), clock published.
_GPUS = {
    "a6000": (51_041_271_808, 84, 1.8, 128, 102_400, 101_376, 1536, 6_291_456, "major: 8 minor: 6"),
    "l4": (23_579_328_512, 58, 2.04, 128, 102_400, 101_376, 1536, 50_331_648, "major: 8 minor: 9"),
    "4090": (25_253_904_384, 128, 2.52, 128, 102_400, 101_376, 1536, 75_497_472, "major: 8 minor: 9"),
    "a100-40": (42_331_013_120, 108, 1.41, 64, 167_936, 166_912, 2048, 41_943_040, "major: 8"),
    "a100-80": (85_100_068_864, 108, 1.41, 64, 167_936, 166_912, 2048, 41_943_040, "major: 8"),
    "h100": (84_942_979_072, 132, 1.98, 128, 233_472, 232_448, 2048, 52_428_800, "major: 9"),
    "h200": (151_397_597_184, 132, 1.98, 128, 233_472, 232_448, 2048, 52_428_800, "major: 9"),
    "b200": (191_514_411_008, 148, 1.965, 128, 233_472, 232_448, 2048, 132_644_864, "major: 10"),
}
_LIBRARIES = "12.8.0", "9.10.0"  # CUDA and cuDNN: the oldest versions that jax's plugin accepts
_TPU_RESERVED = 0.25 * 2**30  # bytes of a TPU's memory that programs cannot use
_GPU_FRACTION = 0.92  # of a GPU's memory that launch/ gives jax (XLA_PYTHON_CLIENT_MEM_FRACTION)


def check_topology(name: str, slices: int = 1) -> None:
    """Raises UserError if a topology is unknown or its compiler is not installed."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology={name}: unknown device {kind!r}; {did_you_mean(kind, CHIPS)}")
    tpu = kind in _TPUS
    if slices > 1 and not tpu:
        raise UserError(f"--slices={slices} requires a TPU; {kind} means the GPUs of one machine.")
    if not re.fullmatch(r"\d+(x\d+){1,2}" if tpu else "[1-8]", shape):
        example = "v5e:4x8 or v5p:2x2x4, with --slices" if tpu else f"{kind}:8, the GPUs of one machine"
        raise UserError(f"--topology={name} is not a layout of {kind}; it should look like {example}.")
    for package, module in _COMPILERS["tpu" if tpu else "gpu"].items():
        if not _is_installed(module):
            raise UserError(f"Compiling for {name} needs {package}: {_INSTALL}")


def topology_devices(name: str, slices: int = 1) -> list["jax.Device"]:
    """Abstract devices of a topology: ``v5e:4x8`` for a slice of TPU chips, ``h100:8`` for a machine with GPUs.

    Args:
      slices: number of TPU slices.

    Raises:
      UserError: as :func:`check_topology`, or the layout does not exist for these chips.
    """
    check_topology(name, slices)
    import jax

    kind, _, shape = name.partition(":")
    try:
        with suppress_stderr(), _libtpu_environment():  # on load the compilers look for hardware, and log that
            if kind in _TPUS:
                return _tpu_devices(kind, shape, slices)
            return _gpu_devices(kind, shape)
    except jax.errors.JaxRuntimeError as error:  # the compiler rejects a layout that its chips do not have
        raise UserError(f"--topology={name} cannot be used: {short_message(error)}.") from None


# Without these, libtpu queries the metadata server of a TPU machine and allows only one process to load it.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@contextlib.contextmanager
def _libtpu_environment() -> Iterator[None]:
    """Sets the variables that libtpu reads on load, and only meanwhile: child processes may use a real TPU."""
    before = {name: os.environ.get(name) for name in _LIBTPU_ENVIRONMENT}
    os.environ |= _LIBTPU_ENVIRONMENT
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _tpu_devices(kind: str, shape: str, slices: int) -> list["jax.Device"]:
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # otherwise each chip counts as two devices
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices


def _gpu_devices(kind: str, shape: str) -> list["jax.Device"]:
    from jax.experimental import topologies

    memory, cores, clock, units, shared, block, threads, cache, capability = _GPUS[kind]
    cuda, cudnn = _LIBRARIES
    extension = "ACCELERATED_FEATURES" if CHIPS[kind].flops > 900e12 else "NONE"  # from Hopper on
    major, minor, patch = cudnn.split(".")
    target = f"""
        platform_name: "CUDA"
        device_description_str: "{CHIPS[kind].kinds[0]}"
        dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
        gpu_device_info {{
          name: "{CHIPS[kind].kinds[0]}" device_memory_size: {memory} memory_bandwidth: {int(CHIPS[kind].bandwidth)}
          core_count: {cores} clock_rate_ghz: {clock} fpus_per_core: {units} l2_cache_size: {cache}
          shared_memory_per_core: {shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {block}
          threads_per_core_limit: {threads} threads_per_block_limit: 1024 threads_per_warp: 32
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          cuda_compute_capability {{ {capability} feature_extension: {extension} }}
          runtime_version: "{cuda}" compile_time_toolkit_version: "{cuda}" dnn_version: "{cudnn}"
        }}"""
    return topologies.get_topology_desc("", platform="cuda", topology=f"1x1x{shape}", target_config=target).devices


def get_chip(device: "jax.Device") -> Chip:
    """The chip of an abstract device."""
    chip = find_chip(device)
    assert chip is not None  # topologies consist of known chips
    return chip


def memory_limit(device: "jax.Device") -> int:
    """Bytes of the device's memory that a program can use."""
    chip = get_chip(device)
    return int(chip.memory - _TPU_RESERVED if chip.name in _TPUS else _GPUS[chip.name][0] * _GPU_FRACTION)
