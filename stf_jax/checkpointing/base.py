"""Frozen parameters that a run does not save, because the weights that it started from have them.

They are read from there as they were at the start, and every one is compared with its checksum.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stf_jax.checkpointing.checksum import compute_checksum, host_checksum
from stf_jax.config import UserError
from stf_jax.files import read_json, write_json
from stf_jax.models.quantized import find_quantization, scale_path

if TYPE_CHECKING:
    from stf_jax.checkpointing.params import ParamSource, SavedParams

BASE = "base.json"  # in a workdir


@dataclasses.dataclass(frozen=True)
class Base:
    """What a run started from.

    Attributes:
      init_from: folders and names as in the config, but absolute.
      shapes: shape and dtype, in the run, of each frozen parameter that is read from there; by path.
    """

    init_from: tuple[str, ...] = ()
    shapes: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)

    def save(self, workdir: epath.Path) -> None:
        """Writes ``base.json``, or deletes it if nothing is read from the base. Raises OSError if that fails."""
        if not self.shapes:
            if (workdir / BASE).exists():
                (workdir / BASE).unlink()
            return
        shapes = {path: [leaf.dtype.name, *leaf.shape] for path, leaf in self.shapes.items()}
        write_json(workdir / BASE, {"init_from": self.init_from, "parameters": shapes})

    def missing(self, workdir: epath.Path, error: UserError) -> UserError:
        """The error if the weights cannot be read."""
        return UserError(f"The run in {workdir} did not save the frozen parameters that it started from: {error}")

    def changed(self, workdir: epath.Path, path: str) -> UserError:
        """The error if a parameter differs from the one that the run started from."""
        return UserError(
            f"{', '.join(self.init_from)} no longer has the weights that the run in {workdir} started from and did not "
            f"save: {path} differs; put them back, or give their folder: in --config.init_from if the run resumes, "
            f"otherwise in {workdir / BASE}."
        )


def read_base(workdir: epath.Path) -> Base:
    """Reads ``base.json``; empty if there is none, or it is damaged."""
    try:
        values = read_json(workdir / BASE)
        shapes = {
            path: jax.ShapeDtypeStruct(tuple(map(int, shape)), jnp.dtype(dtype))
            for path, (dtype, *shape) in values["parameters"].items()
        }
        if not isinstance(values["init_from"], list):
            raise TypeError("init_from is no list")
        return Base(tuple(map(str, values["init_from"])), shapes)
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return Base()


class BasedParams:
    """The parameters of a run that did not save some of them. The attributes are those of SavedParams."""

    def __init__(self, workdir: epath.Path, saved: "SavedParams", base: Base, source: "ParamSource") -> None:
        """Prepares to read.

        Args:
          saved: what the run has of its own.
          base: what it did not save.
          source: the parameters in the folders of the base.

        Raises:
          UserError: the source lacks a parameter.
        """
        self._workdir, self._saved, self._source, self.step = workdir, saved, source, saved.step
        self._base = base
        self.shapes = {**saved.shapes, **base.shapes}
        kinds = ((path, find_quantization(leaf.dtype)) for path, leaf in base.shapes.items())
        self._quantized = {path: kind for path, kind in kinds if kind is not None}
        self._kernel_of = {scale_path(path): path for path in self._quantized}
        for path, leaf in base.shapes.items():
            if path in self._kernel_of:
                continue
            shape = leaf.shape
            if path in self._quantized:
                shape = self._quantized[path].kernel_shape(shape, base.shapes[scale_path(path)].shape)
            if path not in source.shapes or source.shapes[path].shape != shape:
                raise base.changed(workdir, path)

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter into host memory. Raises UserError if it is damaged, or not as it was."""
        if path not in self._base.shapes:
            return self._saved.read(path)
        kernel, dtype = self._kernel_of.get(path, path), self._base.shapes[path].dtype
        value = self._source.read(kernel)
        if (kind := self._quantized.get(kernel)) is not None:
            scales = 1, *self._base.shapes[scale_path(kernel)].shape[1:]
            # Layer by layer, because in float32 it takes twice the memory.
            layers = (kind.quantize(jnp.asarray(layer[None]), scales)[path != kernel] for layer in value)
            value = np.concatenate([np.asarray(layer) for layer in layers])
        value = value.astype(dtype, copy=False)
        self._verify(path, host_checksum(value))
        return value

    def restore(self, shardings: Mapping[str, jax.sharding.Sharding]) -> Iterator[tuple[str, jax.Array]]:
        """Yields paths and parameters with these shardings, one at a time, and a kernel with its scales once.

        Raises UserError if one is damaged, or not as it was.
        """
        kernels = {path: self._kernel_of.get(path, path) for path in shardings if path in self._base.shapes}
        wanted = {kernel: shardings.get(kernel, shardings[path]) for path, kernel in kernels.items()}
        saved = self._saved.restore({path: sharding for path, sharding in shardings.items() if path not in kernels})
        based, pending = self._source.restore(wanted), dict[str, jax.Array]()
        for path in shardings:
            if path not in kernels:
                yield next(saved)
                continue
            if path not in pending:
                pending |= self._convert(*next(based), shardings)
            value = pending.pop(path)
            self._verify(path, compute_checksum(value))
            yield path, value

    def _convert(
        self, path: str, value: jax.Array, shardings: Mapping[str, jax.sharding.Sharding]
    ) -> dict[str, jax.Array]:
        """A parameter of the source as the run has it, and its scales if it is quantized."""
        if (kind := self._quantized.get(path)) is None:
            return {path: _cast(value, self._base.shapes[path].dtype)}
        scale = scale_path(path)
        compiled = jax.jit(kind.quantize, static_argnums=1, out_shardings=(value.sharding, shardings.get(scale)))
        return dict(zip((path, scale), compiled(value, self._base.shapes[scale].shape), strict=True))

    def _verify(self, path: str, checksum: int) -> None:
        if self._saved.frozen_sums.get(path) != checksum:
            raise self._base.changed(self._workdir, self._kernel_of.get(path, path))


@functools.partial(jax.jit, static_argnums=1)
def _cast(value: jax.Array, dtype: Any) -> jax.Array:
    return value.astype(dtype)
