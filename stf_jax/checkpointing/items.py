"""Common parts of what reads and writes checkpoints: checksums of their items, and the kinds of errors."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from stf_jax.checkpointing.checksum import checksum, host_checksum, is_quick_on_host
from stf_jax.config import TryAgain, UserError, short_message
from stf_jax.files import in_bucket

Trees = dict[str, Any]  # the items of a checkpoint that are arrays, each a tree
TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax is still writing
IO_ERRORS = OSError, ValueError, KeyError, TypeError, AttributeError, IndexError  # from Orbax and tensorstore
# Errors of the disk or bucket rather than of the checkpoint.
_NO_ACCESS = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")
_TRANSIENT = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|os_error_code='(5|12|23|24|110|116)'")
_TRANSIENT_ERRNO = errno.EIO, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ETIMEDOUT, errno.ESTALE


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be read, or its checksums do not match. The message says why."""


def error_reason(error: BaseException) -> str:
    """Returns, in a few words, why a read or a write failed."""
    # tensorstore's messages have many file names around the reason, and sometimes a specification in JSON.
    code = re.search(r"\[os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or short_message(error)


@contextlib.contextmanager
def explain_read_errors(folder: epath.Path) -> Iterator[None]:
    """Turns the many types of exceptions that Orbax raises when it reads a checkpoint into three.

    Raises:
      DamagedCheckpoint: something is missing or cannot be read.
      UserError: the checkpoint may not be read.
      TryAgain: the disk or bucket fails in a way that may be temporary.
    """
    try:
        yield
    except (UserError, TryAgain, DamagedCheckpoint, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # some of Orbax's are bare Exception
        reason = error_reason(error)
        if _NO_ACCESS.search(str(error)) or isinstance(error, PermissionError):
            raise UserError(f"Checkpoint {folder} may not be read ({reason}); fix its permissions.") from None
        if _TRANSIENT.search(str(error)) or getattr(error, "errno", None) in _TRANSIENT_ERRNO:
            raise TryAgain(f"Checkpoint {folder} cannot be read now ({reason}); start again later.") from None
        raise DamagedCheckpoint(reason) from error


def read_shapes(item: epath.Path) -> dict[str, Any]:
    """Reads the shape and dtype of every array of an item, by path."""
    return dict(ocp.StandardCheckpointHandler().metadata(item).tree)


def read_sums(folder: epath.Path) -> dict[str, int]:
    """Reads the checksums saved in a folder; empty if there are none or they are damaged themselves."""
    try:
        return dict(json.loads((folder / "sums" / "metadata").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def crc(value: Any) -> int:
    """Computes the checksum of a value that JSON can hold."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def compute_sums(trees: Trees) -> tuple[dict[str, int], list[str]]:
    """Computes checksums of all arrays by item and path; also lists the arrays, not frozen, that are not finite."""
    arrays = {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for name, tree in trees.items()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    small = {name: jax.device_get(leaf) for name, leaf in arrays.items() if is_quick_on_host(leaf)}
    found = {name: (host_checksum(leaf), np.isfinite(leaf).all()) for name, leaf in small.items()}
    if large := {name: leaf for name, leaf in arrays.items() if name not in small}:
        mesh = next((leaf.sharding.mesh for leaf in large.values() if isinstance(leaf.sharding, NamedSharding)), None)
        found |= jax.device_get(_compiled_sums(None if mesh is None else NamedSharding(mesh, PartitionSpec()))(large))
    not_finite = [name for name, (_, finite) in found.items() if not finite and not name.startswith("frozen/")]
    return {name: int(found[name][0]) for name in arrays}, not_finite


@functools.cache
def _compiled_sums(
    replicated: NamedSharding | None,
) -> Callable[[dict[str, jax.Array]], dict[str, tuple[jax.Array, jax.Array]]]:
    def compute(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        return checksum(leaf), jnp.isfinite(leaf).all()

    return jax.jit(lambda arrays: {name: compute(leaf) for name, leaf in arrays.items()}, out_shardings=replicated)


def to_absolute(path: epath.Path | pathlib.Path) -> epath.Path | pathlib.Path:
    """Makes a path absolute, as Orbax requires; URIs of buckets stay as they are, because resolve() breaks them."""
    return path if in_bucket(path) else path.resolve()
