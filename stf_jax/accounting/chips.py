"""Peak performance of accelerators. Does not import jax, so that a wrong chip name is reported at once."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator's peak figures, as published by its vendor."""

    name: str
    kinds: tuple[str, ...]  # values of jax.Device.device_kind
    flops: float  # bfloat16 FLOP/s, dense
    memory: int  # bytes; programs get 1 to 6 % less, because the runtime reserves some
    bandwidth: float  # memory, bytes/s
    link: float  # bytes/s to neighboring chips (ICI, NVLink), one direction, all links together
    network: float  # bytes/s to other slices or nodes (DCN, InfiniBand), one direction, per chip


# Vendors' "GB" of memory are GiB: the 16 GB of a v5e are 17.2e9 bytes.
# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, which give ICI for both directions together, and the network per
# chip or per pod.
# GPUs: NVIDIA's datasheets, which give NVLink for both directions together, and tensor FLOP/s often with sparsity,
# twice the dense figure. The network is that of a DGX, one adapter per GPU.
_CHIPS = (
    # ICI: six links of 50 GB/s (arXiv 2304.01433, table 4). Network: not published; assumed equal to v5p's.
    Chip("v4", ("TPU v4",), 275e12, 32 * _GIB, 1200e9, 300e9, 6.25e9),
    # 400 GB/s of ICI; 6.4 Tbit/s for 256 chips.
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 200e9, 3.125e9),
    # 1200 GB/s of ICI; 50 Gbit/s per chip.
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 600e9, 6.25e9),
    # 800 GB/s of ICI; 25.6 Tbit/s for 256 chips.
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1638e9, 400e9, 12.5e9),
    # "NVIDIA RTX A6000" datasheet (309.7 TFLOPS sparse) and GA102 whitepaper. Its NVLink joins only two cards, so the
    # link is PCIe 4.0 ×16. Network: NVIDIA sells no such system; 100 Gbit/s for a node of eight is assumed.
    Chip("a6000", ("NVIDIA RTX A6000",), 154.8e12, 48 * _GIB, 768e9, 32e9, 1.5625e9),
    # "NVIDIA L4" datasheet (242 TFLOPS sparse). No NVLink: PCIe 4.0 ×16. Network: assumed as for a6000.
    Chip("l4", ("NVIDIA L4",), 121e12, 24 * _GIB, 300e9, 32e9, 1.5625e9),
    # "NVIDIA Ada GPU architecture" whitepaper, with sums in float32. No NVLink and network, as above.
    Chip("4090", ("NVIDIA GeForce RTX 4090",), 165.2e12, 24 * _GIB, 1008e9, 32e9, 1.5625e9),
    # "NVIDIA A100 Tensor Core GPU" datasheet, SXM; DGX A100: eight adapters of 200 Gbit/s.
    Chip("a100-40", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * _GIB, 1555e9, 300e9, 25e9),
    Chip("a100-80", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * _GIB, 2039e9, 300e9, 25e9),
    # "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200" datasheets, SXM (1,979 TFLOPS sparse); DGX H100: 400 Gbit/s.
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989.5e12, 80 * _GIB, 3350e9, 450e9, 50e9),
    Chip("h200", ("NVIDIA H200",), 989.5e12, 141 * _GIB, 4800e9, 450e9, 50e9),
    # "NVIDIA DGX B200" datasheet, an eighth: 72 PFLOPS FP8 sparse is 18 bfloat16 dense, 1,440 GB, 64 TB/s, 14.4 TB/s.
    Chip("b200", ("NVIDIA B200",), 2250e12, 180 * _GIB, 8000e9, 900e9, 50e9),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}


def find_chip(device: "jax.Device") -> Chip | None:
    """Looks up a device's chip; None if it is not in the table (a CPU, a PCIe card)."""
    return next((chip for chip in _CHIPS if device.device_kind in chip.kinds), None)
