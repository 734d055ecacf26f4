"""Simulates a full disk for this process."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Limits files to ``size`` bytes, so that longer writes fail as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
