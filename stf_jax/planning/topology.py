"""Devices that are not here: described ones, for which the real compilers compile."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stf_jax.config import UserError, did_you_mean, short_message
from stf_jax.runtime.chips import CHIPS, chip_of
from stf_jax.runtime.environment import muted

if TYPE_CHECKING:  # jax takes seconds to import, and a wrong name is answered without
    import jax

_NEEDS = "pip install --no-deps -r requirements-plan.txt"
# Packages, and what each lets be imported. jax asks cuDNN's version before it calls its flash attention.
_COMPILERS = {
    "tpu": {"libtpu": "libtpu"},
    "gpu": {"jax-cuda12-pjrt": "jax_plugins.xla_cuda12", "nvidia-cudnn-cu12": "nvidia.cudnn"},
}
_TPUS = ("v4", "v5e", "v5p", "v6e")
# By device: memory (bytes, as its driver tells), multiprocessors, clock (GHz), FP32 units and shared memory (bytes) of
# each, the most of that for one block, threads of each, L2 (bytes), compute capability. Sources: NVIDIA's tuning guides
# and architecture whitepapers; memory and clock as OpenXLA's device descriptions record them.
_GPUS = {
    "a6000": (51_041_271_808, 84, 1.8, 128, 102_400, 101_376, 1536, 6_291_456, "major: 8 minor: 6"),
    "a100-40": (42_331_013_120, 108, 1.41, 64, 167_936, 166_912, 2048, 41_943_040, "major: 8"),
    "a100-80": (85_100_068_864, 108, 1.41, 64, 167_936, 166_912, 2048, 41_943_040, "major: 8"),
    "h100": (84_942_979_072, 132, 1.98, 128, 233_472, 232_448, 2048, 52_428_800, "major: 9"),
    "h200": (151_397_597_184, 132, 1.98, 128, 233_472, 232_448, 2048, 52_428_800, "major: 9"),
    "b200": (191_514_411_008, 148, 1.965, 128, 233_472, 232_448, 2048, 132_644_864, "major: 10"),
}
_LIBRARIES = "12.8.0", "9.10.0"  # CUDA and cuDNN, the oldest that jax's plugin takes
_TPU_LEFT = 0.25 * 2**30  # bytes of a TPU's memory that programs do not get
_GPU_SHARE = 0.92  # of a GPU's memory that launch/ lets jax take (XLA_PYTHON_CLIENT_MEM_FRACTION)


def check_topology(name: str, slices: int = 1) -> None:
    """Raises UserError for an unknown topology, or where the compiler for it is not installed."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology={name}: unknown device {kind!r}; {did_you_mean(kind, CHIPS)}")
    tpu = kind in _TPUS
    if slices > 1 and not tpu:
        raise UserError(f"--slices={slices} is of TPUs; {kind} has the cards of one machine.")
    if not re.fullmatch(r"\d+(x\d+){1,2}" if tpu else "[1-8]", shape):
        wanted = "v5e:4x8, or v5p:2x2x4, with --slices" if tpu else f"{kind}:8, the cards of one machine"
        raise UserError(f"--topology={name} is not a layout of {kind}; it should be like {wanted}.")
    for package, module in _COMPILERS["tpu" if tpu else "gpu"].items():
        if not _installed(module):
            raise UserError(f"Compiling for {name} needs {package}: {_NEEDS}")


def topology_devices(name: str, slices: int = 1) -> list["jax.Device"]:
    """The devices of a topology: ``v5e:4x8`` of chips for a TPU slice, ``h100:8`` of cards for a GPU machine.

    Args:
      slices: of a TPU, how many of them.

    Raises:
      UserError: as :func:`check_topology`, or the chips have no such layout.
    """
    check_topology(name, slices)
    import jax

    kind, _, shape = name.partition(":")
    try:
        with muted(), _libtpu_loads():  # the compilers look for hardware when they are loaded, and log that
            return (_tpus if kind in _TPUS else _gpus)(kind, shape, slices)
    except jax.errors.JaxRuntimeError as error:  # the compiler's word on a layout that its chips do not have
        raise UserError(f"--topology={name} cannot be described: {short_message(error)}.") from None


# libtpu would ask the metadata server of a TPU machine; and let several processes load it, since none holds a TPU.
_LIBTPU_READS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@contextlib.contextmanager
def _libtpu_loads() -> Iterator[None]:
    """Sets what libtpu reads when it is loaded, and only then: children of this process may use a real TPU."""
    before = {name: os.environ.get(name) for name in _LIBTPU_READS}
    os.environ |= _LIBTPU_READS
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it would be in
        return False


def _tpus(kind, shape, slices):
    from jax.experimental import topologies

    how = {"chip_config_name": "megacore"} if kind == "v4" else {}  # else each chip counts as two devices
    if shape == "1x1":
        how["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        how["num_slices"] = slices
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **how).devices


def _gpus(kind, shape, _):
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


def memory_limit(device: "jax.Device") -> int:
    """Bytes of the device's memory that a program may fill."""
    chip = chip_of(device)
    return int(chip.memory - _TPU_LEFT if chip.name in _TPUS else _GPUS[chip.name][0] * _GPU_SHARE)
