"""What all commands share: exit statuses, types of options, and ``--config`` with its overrides."""

import argparse
import contextlib
import importlib.util
import logging
import os
import pathlib
import re
import select
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NoReturn, get_args, overload

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from stf_jax.config import (
    Precision,
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
from stf_jax.environment import configure_process, quiet_libraries
from stf_jax.files import in_bucket, to_path

_VERBOSE = "-v"
_MAX_MESSAGE = 2000  # characters


class _TqdmHandler(logging.StreamHandler):
    """Writes log lines above progress bars without breaking them."""

    def emit(self, record: logging.LogRecord) -> None:
        import tqdm  # not needed by commands that log nothing

        try:
            tqdm.tqdm.write(self.format(record), file=self.stream)
        except Exception:
            self.handleError(record)


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None, *, compilers: bool = False) -> int:
    """Runs a command and returns its exit status (docs/operations.md). Prints errors as one sentence on stderr.

    Any exception that is not of :mod:`stf_jax.config` is a bug and keeps its traceback (status 1). On an error, other
    hosts of the run do not have to wait for this one. Logs of libraries are shown only with ``-v``, which every command
    accepts.

    Args:
      main: the command, given its arguments.
      argv: the arguments; default: those of the process.
      compilers: as for :func:`stf_jax.environment.configure_process`.
    """
    argv = sys.argv[1:] if argv is None else argv
    configure_process(compilers=compilers)
    log = logging.getLogger("stf_jax")  # decisions made for the user, one line each, on standard error
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = [_TqdmHandler()], False
    try:
        with contextlib.nullcontext() if _VERBOSE in argv else _quiet():
            try:
                main([argument for argument in argv if argument != _VERBOSE])
            finally:
                sys.stdout.flush()  # raises here, not when Python exits, if the reader has closed the pipe
    except (UserError, RunFailed, TryAgain, Stopped) as error:
        # Quoted text is shortened where it is quoted; this limits whatever was missed there.
        text = shorten(str(error), _MAX_MESSAGE)
        print(text if isinstance(error, Stopped) else f"error: {text}", file=sys.stderr)
        return _exit_soon(error.status)
    except KeyboardInterrupt:
        print("Interrupted; run the same command to resume.", file=sys.stderr)
        return _exit_soon(130)  # the shells' convention
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_pipe_closed():
            return _exit_soon(141)  # the shells' convention
        if "jax" in sys.modules:
            from stf_jax.parallel import hosts

            if hosts.is_peer_lost(error):
                print(f"error: {hosts.PEER_LOST} ({short_message(error)}).", file=sys.stderr)
                return _exit_soon(TryAgain.status)
        if isinstance(error, ModuleNotFoundError) and _is_not_installed(error.name):
            print(
                f"error: This command needs {error.name}, which is not installed: make .venv/ready, or pip install -r "
                "requirements.txt, installs what all commands need.",
                file=sys.stderr,
            )
            return _exit_soon(UserError.status)
        _exit_soon(1)
        raise
    finally:
        log.handlers, log.propagate = [], True
    return _exit_soon(0)


def _exit_soon(status: int) -> int:
    if "jax" in sys.modules:  # without jax there are no other hosts
        from stf_jax.parallel import hosts

        hosts.exit_soon(status)
    return status


def _is_not_installed(module: str | None) -> bool:
    """Whether a module belongs to a package that is absent as a whole. One that misses a part has a bug."""
    package = (module or "").partition(".")[0]
    return bool(package) and importlib.util.find_spec(package) is None


def _is_pipe_closed() -> bool:
    """Whether the reader of the output is gone (``… | head -1``). If so, redirects it, so that Python exits quietly."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # tests replace streams with objects without a descriptor
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if poll.poll(0):  # an error, or the other end is closed
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                closed = True
    return closed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]  # both used by Orbax
    for logger in loggers:
        logger.addFilter(_has_no_traceback)
    # The unraisable hook stays: Orbax's leftovers may be collected after the command.
    sys.unraisablehook, threading.excepthook = _on_unraisable, _on_thread_exception
    try:
        with quiet_libraries():
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_has_no_traceback)
        threading.excepthook = threading.__excepthook__


# Failed writes are reported once, by checkpoint.py and events.py; libraries would print them many times.


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


_report_unraisable = sys.unraisablehook


def _on_unraisable(failure: "sys.UnraisableHookArgs") -> None:
    # When one of tensorstore's operations fails, Orbax closes the event loop of the others.
    if "Event loop is closed" not in str(failure.exc_value) and "TensorStore" not in str(failure.exc_value):
        _report_unraisable(failure)


def _on_thread_exception(failure: threading.ExceptHookArgs) -> None:
    if not issubclass(failure.exc_type, OSError):  # raised in TensorBoard's thread
        threading.__excepthook__(failure)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """As :class:`argparse.ArgumentParser`. Documents ``-v``, which :func:`run_command` handles."""
        super().__init__(*args, **options)
        if self.add_help:
            self.add_argument(
                _VERBOSE, action="store_true", default=argparse.SUPPRESS, help="also show the log messages of libraries"
            )

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        raise UserError(f"{message[0].upper()}{message[1:].removesuffix('.')}; see --help.")


def path(text: str) -> epath.Path:
    """Parses an option that is a path."""
    try:
        return to_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_text(text: str) -> str:
    """Checks an option that is a path or empty; returns the text."""
    if text:
        path(text)
    return text


def local_path(text: str) -> pathlib.Path:
    """Parses an option that is a path on this machine's disks."""
    if in_bucket(found := path(text)):
        raise argparse.ArgumentTypeError(f"{text} is in a bucket; give a path on this machine's disks")
    return pathlib.Path(found)


def require(found: epath.Path) -> epath.Path:
    """Raises UserError unless the path exists. Commands check this before imports that take seconds."""
    if not found.exists():
        raise UserError(f"{found} {_describe_missing(found)}; give a folder or file.")
    return found


def _describe_missing(name: str | os.PathLike[str]) -> str:
    if os.path.islink(name):
        return f"is a link to {shorten(os.readlink(name))}, which does not exist"
    return "does not exist"


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of where and how a model computes: mesh and precision."""
    parser.add_argument(
        "--mesh",
        type=_parse_mesh,
        default=(1, 1, 1),
        metavar="DATA,FSDP,TENSOR",
        help="devices along each mesh axis (default: 1,1,1)",
    )
    parser.add_argument(
        "--precision",
        choices=["", *get_args(Precision)],
        default="",
        help="compute precision (default: the run's, or bfloat16)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that run a model: mesh, precision, token reduction and sampling."""
    add_device_arguments(parser)
    parser.add_argument(
        "--reduce",
        default="",
        metavar="NAME[:KEY=VALUE,…]",
        help="untrained reducer of image tokens with its options (docs/evaluating.md), or module:thing of your own",
    )
    parser.add_argument(
        "--keep",
        type=_number_between(int, 0, 2**31 - 1),
        default=0,
        metavar="N",
        help="image tokens kept per image with --reduce, as its options count them (default: one quarter)",
    )
    parser.add_argument(
        "--tokens",
        type=_parse_tokens,
        default=0,
        metavar="N|auto",
        help="image tokens per image, one of the model's budgets, or chosen for each image (docs/budgets.md; default: "
        "the most)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="NATS",
        help="with --tokens=auto, how far answers may be from those with the most tokens, per answer token",
    )
    parser.add_argument(
        "--temperature",
        type=_number_between(float, 0, 100),
        default=0.0,
        help="sampling temperature; 0 is greedy decoding (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=_number_between(float, 0, 1),
        default=1.0,
        help="nucleus sampling threshold (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=_number_between(int, 0, 2**31 - 1),
        default=0,
        help="sample from the k most probable tokens; 0 means all (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_number_between(int, 0, 2**31 - 1), default=0, help="sampling seed (default: %(default)s)"
    )


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for several hosts, the arguments of :func:`stf_jax.parallel.hosts.join`."""
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address and a free port of process 0, reachable from all hosts"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


def _parse_tokens(text: str) -> float | str:
    try:
        return text if text == "auto" else _number_between(int, 0, 2**31 - 1)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _parse_mesh(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(re.fullmatch(r"-?\d+", size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} should be three comma-separated integers, such as 1,4,2")
    return tuple(map(int, sizes))


def _number_between(number_type: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    def parse_number(text: str) -> float:
        value = number_type(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse_number.__name__ = number_type.__name__  # shown in argparse's errors
    return parse_number


@overload
def parse(
    argv: list[str],
    help_text: str,
    *,
    workdir: Literal[True] = True,
    defaults: Callable[[], ml_collections.ConfigDict] = default_config,
) -> tuple[epath.Path, ml_collections.ConfigDict]: ...


@overload
def parse(
    argv: list[str],
    help_text: str,
    *,
    workdir: Literal[False],
    defaults: Callable[[], ml_collections.ConfigDict] = default_config,
) -> tuple[None, ml_collections.ConfigDict]: ...


def parse(
    argv: list[str],
    help_text: str,
    *,
    workdir: bool = True,
    defaults: Callable[[], ml_collections.ConfigDict] = default_config,
) -> tuple[epath.Path | None, ml_collections.ConfigDict]:
    """Parses ``--config=FILE[:ARG]``, overrides ``--config.KEY=VALUE`` and, with ``workdir``, ``--workdir=DIR``.

    Prints ``help_text`` and exits with status 0 for ``--help``.

    Args:
      argv: the arguments.
      help_text: printed for ``--help``.
      workdir: whether ``--workdir`` is required; otherwise it is refused.
      defaults: returns a config with all existing keys, for suggestions when one is misspelled.

    Returns:
      The workdir or None, and the config, not yet resolved.

    Raises:
      UserError: a missing or unknown option, a config file that is missing or fails, an unknown key or a value of the
        wrong type.
    """
    if not argv or "--help" in argv or "-h" in argv:
        print(help_text, end="")
        sys.exit(0)
    argv = [_expand_config_name(item) for item in argv]
    values = flags.FlagValues()
    if workdir:
        flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", *argv])
        rest = values(["", *argv])[1:]
        if values["config"].present:
            values.config.lock()  # a file that could not be opened raises only when the config is used
    except Exception as error:  # from the flag library or the config file, which is user input
        # The libraries wrap a ValueError in another, of its type or their own: the first is the config file's.
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        for cause in reversed(causes):
            if isinstance(cause, UserError):
                raise cause from None
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


def _expand_config_name(option: str) -> str:
    """Replaces the name in ``--config=NAME[:ARG]`` with the path of that file in configs/; leaves other options."""
    match = re.fullmatch(r"(--?config=)([\w/]+)(:.*)?", option, re.DOTALL)
    if not match or os.path.exists(match[2]):
        return option
    package = pathlib.Path(__file__).parent
    # configs/ is beside the package in a repository, inside it in a wheel.
    files = [folder / "configs" / f"{match[2]}.py" for folder in (package.parent, package)]
    file = next((file for file in files if os.path.isfile(file)), None)
    return f"{match[1]}{file}{match[3] or ''}" if file else option


def _explain(error: Exception, argv: list[str], defaults: Callable[[], ml_collections.ConfigDict]) -> str:
    """Explains in one sentence what the flag library or the config file raised."""
    missing = re.search(r"\w+", str(error))  # the key that ml_collections names first
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
            if stage and missing and missing[0] in re.split(r"\W", item):
                return f"The config file does not set {stage}{key}; set it for all stages as {key}."
    if isinstance(error, AttributeError) and error.name in ("get_config", "lock"):
        return "The config file needs a function get_config(arg) that returns a ConfigDict."
    if isinstance(error, SyntaxError):
        return f"The config file cannot be read: {_single_line(error)}."
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if frame.name in _CONFIG_FUNCTIONS]
        if frames:
            location = f"{frames[-1].filename}, line {frames[-1].lineno}"
            return f"The config file fails at {location}: {type(cause).__name__}: {_single_line(cause)}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) or "Error whilst parsing config file" in str(error):
        return f"The config file cannot be loaded: {_explain_file(error.__cause__ or error, argv)}."
    return f"The command line cannot be used: {_single_line(error) or type(error).__name__}"


def _explain_file(error: BaseException, argv: list[str]) -> str:
    """Explains why a config file could not be opened; otherwise returns the last line of Python's message."""
    text = ([""] + re.findall(r"^--?config[=\n](.*)$", "\n".join(argv), re.MULTILINE))[-1]
    name = text.partition(":")[0]
    if re.match(r"\w+://", text):
        return f"{shorten(text)} is a URL, but a config must be a file on this machine's disks"
    if name and isinstance(error, OSError):
        # For a missing file, the library's error has no strerror.
        return f"{shorten(name)}: {error.strerror}" if error.strerror else f"{shorten(name)} {_describe_missing(name)}"
    return "".join(str(error).strip().splitlines()[-1:]).strip(" .")


def _explain_group(stage: str, group: str, value: str, keys: Iterable[str]) -> str:
    """Explains in one sentence that a value was set for a group of keys, and names the keys that may be meant."""
    members = [key for key in keys if key.startswith(f"{group}." if group else "")]
    namesake = f"{group}.{group.rpartition('.')[2]}"  # model.fusion.fusion
    options = [f"--config.{stage}{key}" for key in ([namesake] if namesake in members else members)]
    hint = f"did you mean {options[0]}={value}?" if namesake in members else f"set one of {', '.join(options)}."
    return f"--config.{stage}{group}={value} sets a group of keys: {hint}"


_CONFIG_FUNCTIONS = ("get_config", "<module>")  # functions of config files, as tracebacks name them


def _single_line(error: BaseException) -> str:
    """Returns the message on one line, without ml_collections' list of all keys next to an unknown one."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r" Other fields present: .*}\"", "", text.replace("\\n", " "), flags=re.DOTALL)
    return " ".join(text.split())
