"""What every command's line shares: exit statuses, paths, and ``--config`` with its overrides."""

import argparse
import contextlib
import logging
import os
import pathlib
import re
import select
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from stf_jax.config import (
    REDUCTIONS,
    RunFailed,
    Stopped,
    TryAgain,
    UserError,
    default_config,
    did_you_mean,
    flatten,
    short_message,
    shorten,
)
from stf_jax.runtime.environment import quiet_libraries, settle
from stf_jax.runtime.files import in_bucket, to_path

_VERBOSE = "-v"
_LONGEST_MESSAGE = 2000  # characters


class _BesideBars(logging.StreamHandler):
    """Writes lines above the progress bars that are drawn, which stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        import tqdm  # what shows no bar has no need of it

        try:
            tqdm.tqdm.write(self.format(record), file=self.stream)
        except Exception:
            self.handleError(record)


def door(main: Callable[[list[str]], None], argv: list[str] | None = None, *, compilers: bool = False) -> int:
    """Runs a command; returns the exit status (docs/operations.md); one sentence on stderr says why it is not 0.

    Any other exception than those of :mod:`stf_jax.config` is our bug and keeps its traceback (status 1). Other hosts
    of the run are not left to wait. What libraries log is shown only with ``-v``, which every command takes.

    Args:
      compilers: as for :func:`stf_jax.runtime.environment.settle`.
    """
    argv = sys.argv[1:] if argv is None else argv
    settle(compilers=compilers)
    log = logging.getLogger("stf_jax")  # what was chosen for the user, a line each, on standard error
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = [_BesideBars()], False
    try:
        with contextlib.nullcontext() if _VERBOSE in argv else _quiet():
            try:
                main([argument for argument in argv if argument != _VERBOSE])
            finally:
                sys.stdout.flush()  # a reader who has gone is noticed here, not when Python ends
    except (UserError, RunFailed, TryAgain, Stopped) as error:
        # Foreign texts are cut where they are quoted; what was missed there floods no screen either.
        text = shorten(str(error), _LONGEST_MESSAGE)
        print(text if isinstance(error, Stopped) else f"error: {text}", file=sys.stderr)
        return _leave(error.status)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on where it was.", file=sys.stderr)
        return _leave(130)  # as shells have it
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return _leave(141)  # as shells have it
        if "jax" in sys.modules:
            from stf_jax.runtime import hosts

            if hosts.lost(error):
                print(f"error: {hosts.LOST} ({short_message(error)}).", file=sys.stderr)
                return _leave(TryAgain.status)
        _leave(1)
        raise
    finally:
        log.handlers, log.propagate = [], True
    return 0


def _leave(status):
    if "jax" in sys.modules:  # else there are no others to leave
        from stf_jax.runtime import hosts

        hosts.leave(status)
    return status


def _reader_has_gone():
    """Whether nobody reads what is printed any more (``… | head -1``); Python would complain of it again at its end."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a test's, which is no file
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if poll.poll(0):  # an error, or that the other end is closed
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                gone = True
    return gone


@contextlib.contextmanager
def _quiet():
    libraries = [logging.getLogger(name) for name in ("absl", "asyncio")]  # Orbax's two
    for library in libraries:
        library.addFilter(_without_traceback)
    # The first stays: what Orbax left behind may end after the command.
    sys.unraisablehook, threading.excepthook = _library_failed, _thread_failed
    try:
        with quiet_libraries():
            yield
    finally:
        for library in libraries:
            library.removeFilter(_without_traceback)
        threading.excepthook = threading.__excepthook__


# What cannot be written is told by who waits for it (checkpoint.py, journal.py), once; libraries print it many times.


def _without_traceback(record):
    return not record.exc_info


_report_unraisable = sys.unraisablehook


def _library_failed(failure):
    # Orbax closes the loop over tensorstore's other writes and reads when one has failed.
    if "Event loop is closed" not in str(failure.exc_value) and "TensorStore" not in str(failure.exc_value):
        _report_unraisable(failure)


def _thread_failed(failure):
    if not issubclass(failure.exc_type, OSError):  # of TensorBoard's thread
        threading.__excepthook__(failure)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def __init__(self, *args: Any, **options: Any):
        """As :class:`argparse.ArgumentParser`; ``-v`` is for :func:`door`, and only shown here."""
        super().__init__(*args, **options)
        if self.add_help:
            self.add_argument(
                _VERBOSE, action="store_true", default=argparse.SUPPRESS, help="show what libraries log, too"
            )

    def error(self, message: str):
        """Raises instead of printing the usage."""
        raise UserError(f"{message[0].upper()}{message[1:].removesuffix('.')}; see --help.")


def path(text: str) -> epath.Path:
    """The type of options that are paths."""
    try:
        return to_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_text(text: str) -> str:
    """The type of options that are paths, or empty, and stay text."""
    if text:
        path(text)
    return text


def local_path(text: str) -> pathlib.Path:
    """The type of options that are paths of this machine's disks."""
    if in_bucket(found := path(text)):
        raise argparse.ArgumentTypeError(f"{text} is in a bucket; give a path on this machine's disks")
    return pathlib.Path(found)


def require(found: epath.Path) -> epath.Path:
    """Raises UserError where nothing is there; for what would else be missed after imports that take seconds."""
    if not found.exists():
        raise UserError(f"{found} {_absent(found)}; give a folder or file.")
    return found


def _absent(name):
    if os.path.islink(name):
        return f"is a link to {shorten(os.readlink(name))}, which does not exist"
    return "does not exist"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is laid out, computed and decoded, for the verbs that ask it."""
    parser.add_argument(
        "--mesh", type=_mesh, default=(1, 1, 1), metavar="DATA,FSDP,TENSOR", help="devices along each axis; 1,1,1"
    )
    parser.add_argument(
        "--precision", choices=["", "bfloat16", "float32"], default="", help="to compute in; the run's own, or bfloat16"
    )
    parser.add_argument(
        "--reduce", choices=REDUCTIONS, default="", help="answer with fewer image tokens, without training"
    )
    parser.add_argument(
        "--keep",
        type=_within(int, 0, 2**31 - 1),
        default=0,
        metavar="N",
        help="image tokens per image that --reduce leaves; a quarter",
    )
    parser.add_argument(
        "--temperature", type=_within(float, 0, 100), default=0.0, help="0: the likeliest token (%(default)s)"
    )
    parser.add_argument(
        "--top-p", type=_within(float, 0, 1), default=1.0, help="draw from the likeliest of this share (%(default)s)"
    )
    parser.add_argument(
        "--top-k", type=_within(int, 0, 2**31 - 1), default=0, help="draw from so many of the likeliest; 0: all"
    )
    parser.add_argument("--seed", type=_within(int, 0, 2**31 - 1), default=0, help="of draws (%(default)s)")


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of several hosts this is: the arguments of :func:`stf_jax.runtime.hosts.join`."""
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of several hosts: the first, and a free port there, as all reach it"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process", type=int, metavar="I", help="which this is, from 0")


def _mesh(text):
    sizes = text.split(",")
    if len(sizes) != 3 or not all(re.fullmatch(r"-?\d+", size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} should be three numbers with commas between, such as 1,4,2")
    return tuple(map(int, sizes))


def _within(kind, low, high):
    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # which argparse names
    return read


def parse(
    argv: list[str],
    help_text: str,
    *,
    workdir: bool = True,
    defaults: Callable[[], ml_collections.ConfigDict] = default_config,
) -> tuple[epath.Path | None, ml_collections.ConfigDict]:
    """Reads ``--config=FILE[:ARG]``, its overrides ``--config.KEY=VALUE`` and, unless none is asked, ``--workdir=DIR``.

    Prints ``help_text`` and exits with status 0 for ``--help``.

    Args:
      defaults: has all keys that there are, of which a misspelt one is explained.

    Returns:
      The workdir or None, and the config, not yet resolved.

    Raises:
      UserError: a missing or unknown option, a config file that is not there or fails, an unknown key or a value of
        the wrong type.
    """
    if not argv or "--help" in argv or "-h" in argv:
        print(help_text, end="")
        sys.exit(0)
    argv = [_config_file(item) for item in argv]
    values = flags.FlagValues()
    if workdir:
        flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", *argv])
        rest = values(["", *argv])[1:]
        if values["config"].present:
            values.config.lock()  # a file that could not be opened says so only when the config is used
    except UserError:
        raise
    except Exception as error:  # the flag library's, or any that the config file raises, which is the user's input
        raise UserError(_explain(error, argv, defaults)) from None
    if rest:
        raise UserError(f"Unexpected argument {rest[0]!r}; see --help.")
    for option in ("config", "workdir")[: 1 + workdir]:
        if values[option].value is None:
            raise UserError(f"--{option} is missing; see --help.")
    try:
        return to_path(values.workdir) if workdir else None, values.config
    except UserError as error:
        raise UserError(f"--workdir: {error}") from None


def _config_file(option):
    """``--config=NAME[:ARG]`` with the file of that name in configs/; any other option as it is."""
    named = re.fullmatch(r"(--?config=)([\w/]+)(:.*)?", option, re.DOTALL)
    if not named or os.path.exists(named[2]):
        return option
    package = pathlib.Path(__file__).parents[1]
    # In a repository beside the package, in a wheel inside it.
    files = [folder / "configs" / f"{named[2]}.py" for folder in (package.parent, package)]
    file = next((file for file in files if os.path.isfile(file)), None)
    return f"{named[1]}{file}{named[3] or ''}" if file else option


def _explain(error, argv, defaults):
    """One sentence for what the flag library or the config file raised."""
    lacking = re.search(r"\w+", str(error))  # what ml_collections names first
    group = re.search(r"--?config\.(stages\.\w+\.)?([\w.]+)=(.*): Failed to parse .* as a ConfigDict", str(error))
    if group and group[2].startswith("stages"):
        name = group[2].partition(".")[2] or "NAME"
        return f"--config.{group[2]}={group[3]} sets a group of keys: name one, such as --config.stages.{name}.steps."
    if group:
        return _explain_group(group[1] or "", group[2], group[3], flatten(defaults().to_dict()))
    for item in argv:
        override = re.match(r"--?(?:no)?config\.(stages\.\w+\.)?([\w.]+)", item)
        if override and isinstance(error, (AttributeError, KeyError)):
            stage, key = override.groups()
            keys = list(flatten(defaults().to_dict()))
            if stage and any(name.startswith(f"{key}.") for name in keys):
                return _explain_group(stage, key, item.partition("=")[2], keys)
            if key not in keys:
                return f"Unknown config key {key!r}: {did_you_mean(key, keys)}"
            if stage and lacking and lacking[0] in re.split(r"\W", item):
                return f"The config file has no {stage}{key} to change; it can be given to all stages as {key}."
    if isinstance(error, AttributeError) and error.name in ("get_config", "lock"):
        return "The config file needs a function get_config(arg) that returns a ConfigDict."
    if isinstance(error, SyntaxError):
        return f"The config file cannot be read: {_one_line(error)}."
    cause = error
    while cause is not None:
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if frame.name in _OF_CONFIG_FILES]
        if frames:
            where = f"{frames[-1].filename}, line {frames[-1].lineno}"
            return f"The config file fails at {where}: {type(cause).__name__}: {_one_line(cause)}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) or "Error whilst parsing config file" in str(error):
        return f"The config file cannot be loaded: {_explain_file(error.__cause__ or error, argv)}."
    return f"The command line cannot be used: {_one_line(error) or type(error).__name__}"


def _explain_file(error, argv):
    """Why a config file could not be opened, or the last line of what Python said of it."""
    text = ([""] + re.findall(r"^--?config[=\n](.*)$", "\n".join(argv), re.MULTILINE))[-1]
    name = text.partition(":")[0]
    if re.match(r"\w+://", text):
        return f"{shorten(text)} is a URL, and a config is a file on this machine's disks"
    if name and isinstance(error, OSError):
        # Where the file is not there, the library raises an error that has no reason.
        return f"{shorten(name)}: {error.strerror}" if error.strerror else f"{shorten(name)} {_absent(name)}"
    return "".join(str(error).strip().splitlines()[-1:]).strip(" .")


def _explain_group(stage, group, value, keys):
    """One sentence for a value that was given to a group of keys, which names those that may have been meant."""
    inside = [key for key in keys if key.startswith(f"{group}." if group else "")]
    same = f"{group}.{group.rpartition('.')[2]}"  # model.fusion.fusion
    options = [f"--config.{stage}{key}" for key in ([same] if same in inside else inside)]
    named = f"did you mean {options[0]}={value}?" if same in inside else f"give it to one of {', '.join(options)}."
    return f"--config.{stage}{group}={value} sets a group of keys: {named}"


_OF_CONFIG_FILES = ("get_config", "<module>")  # functions, as tracebacks name them


def _one_line(error):
    """The message without line breaks, and without ml_collections' list of every key beside an unknown one."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r" Other fields present: .*}\"", "", text.replace("\\n", " "), flags=re.DOTALL)
    return " ".join(text.split())
