"""What every verb's command line shares: exit statuses, and ``--config`` with its overrides."""

import logging
import pathlib
import re
import sys
from collections.abc import Callable

import ml_collections
from absl import flags
from ml_collections import config_flags

from stf_jax.config import UserError, default_config, flatten, nearest


def door(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0, or 2 with one sentence on standard error for input that cannot be used.

    Any other exception is our bug and keeps its traceback (status 1).
    """
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str], help_text: str) -> tuple[pathlib.Path, ml_collections.ConfigDict]:
    """Reads ``--config=FILE[:ARG]``, its overrides ``--config.KEY=VALUE`` and ``--workdir=DIR``.

    Prints ``help_text`` and exits with status 0 for ``--help``.

    Returns:
      The workdir and the config, not yet resolved.

    Raises:
      UserError: a missing or unknown option, a config file that is not there, an unknown key or a value of the wrong
        type.
    """
    if not argv or "--help" in argv or "-h" in argv:
        print(help_text, end="")
        sys.exit(0)
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", *argv])
        rest = values(["", *argv])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(_explain(error, argv)) from None
    if rest:
        raise UserError(f"Unexpected argument {rest[0]!r}; see --help.")
    for option in ("config", "workdir"):
        if values[option].value is None:
            raise UserError(f"--{option} is missing; see --help.")
    return pathlib.Path(values.workdir), values.config


def _explain(error, argv):
    """One sentence for what the flag library raised."""
    for item in argv:
        override = re.match(r"--(?:no)?config\.(?:stages\.\w+\.)?([\w.]+)", item)
        if override and isinstance(error, (AttributeError, KeyError)):
            keys = list(flatten(default_config().to_dict()))
            if override[1] not in keys:
                return f"Unknown config key {override[1]!r}: {nearest(override[1], keys)}"
    if isinstance(error, OSError):
        return f"The config file cannot be loaded: {str(error).splitlines()[-1].strip()}."
    return f"The command line cannot be used: {' '.join(str(error).split())}"
