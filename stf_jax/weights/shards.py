"""Safetensors as Hugging Face lays them out: shards of bounded size, and an index that places each tensor."""

import json
import pathlib
from collections.abc import Iterable

import numpy as np
from safetensors.flax import save_file

SHARD = 2 * 2**30  # bytes in one file at most, unless a single tensor is larger


def write_shards(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], limit: int = SHARD) -> None:
    """Writes ``model.safetensors``, or ``model-00001-of-0000n.safetensors`` … with their index where one is too small.

    One shard is held in memory at a time.
    """
    files: list[pathlib.Path] = []
    places: dict[str, int] = {}
    held: dict[str, np.ndarray] = {}
    total = 0

    def write():
        file = folder / f"model-{len(files) + 1:05}.safetensors"
        file.touch()
        mode = file.stat().st_mode  # as the umask has it; safetensors makes its files for their owner alone
        save_file(held, file, metadata={"format": "pt"})  # which transformers asks for
        file.chmod(mode)
        files.append(file)
        held.clear()

    for name, value in tensors:
        if held and sum(other.nbytes for other in held.values()) + value.nbytes > limit:
            write()
        held[name] = value
        places[name] = len(files)
        total += value.nbytes
    write()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    named = [file.rename(folder / f"model-{i + 1:05}-of-{len(files):05}.safetensors") for i, file in enumerate(files)]
    index = {"metadata": {"total_size": total}, "weight_map": {name: named[i].name for name, i in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
