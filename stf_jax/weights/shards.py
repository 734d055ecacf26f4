"""Writes safetensors in Hugging Face's layout: shards of bounded size, and an index of the tensors."""

import json
import pathlib
from collections.abc import Iterable

import numpy as np
from safetensors.flax import save_file

SHARD = 2 * 2**30  # maximum bytes per file, unless a single tensor is larger


def write_shards(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], limit: int = SHARD) -> None:
    """Writes ``model.safetensors``, or ``model-00001-of-0000n.safetensors``, … and their index if one is too small.

    Only one shard is in memory at a time.
    """
    files: list[pathlib.Path] = []
    shard_of: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        file = folder / f"model-{len(files) + 1:05}.safetensors"
        write_file(file, shard)
        files.append(file)
        shard.clear()

    for name, value in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + value.nbytes > limit:
            write()
        shard[name] = value
        shard_of[name] = len(files)
        total += value.nbytes
    write()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    renamed = [file.rename(folder / f"model-{i + 1:05}-of-{len(files):05}.safetensors") for i, file in enumerate(files)]
    index = {"metadata": {"total_size": total}, "weight_map": {name: renamed[i].name for name, i in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_file(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file of safetensors."""
    file.touch()
    mode = file.stat().st_mode  # as set by the umask; safetensors makes files that only their owner can read
    # The metadata is required by transformers.
    save_file(tensors, file, metadata={"format": "pt"})  # type: ignore[arg-type]  # it accepts NumPy's arrays too
    file.chmod(mode)
