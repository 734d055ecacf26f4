"""The command line that all commands share: invalid input gives one line and exit status 2."""

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections.config_flags import config_flags

from stf_jax import environment
from stf_jax.cli import Parser, local_path, parse, path, path_text, require, run_command
from stf_jax.config import DataConfig, ModelConfig, TrainConfig, UserError, resolve
from stf_jax.files import check_paths, to_path

HELP = "Usage: see this page.\n"
PLAIN = """
from stf_jax.config import default_config, parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, steps=3, name="plain")
    config = default_config()
    config.steps = arg.steps
    config.name = arg.name
    return config
"""
STAGED = """
from stf_jax.config import default_config

def get_config(arg=None):
    config = default_config()
    config.run = ("text", "captions")
    config.stages = {
        "text": {"steps": 3, "optimizer": {"learning_rate": 2e-3}},
        "captions": {"steps": 4, "model": {"fusion": {"taps": (3, 2)}}},
    }
    return config
"""


@pytest.fixture(autouse=True)
def fresh_config_module(monkeypatch):
    """ml_collections loads every config file as the same module, which would keep the one before."""
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    yield
    sys.modules.pop("config_config", None)


@pytest.fixture
def file(tmp_path):
    """Writes a config file."""

    def write(text, name="config.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command that resolves its config: returns exit status, standard error, stages and workdir."""
    seen = {}

    def main(argv):
        workdir, config = parse(argv, HELP)
        seen.update(workdir=workdir, stages=resolve(config))

    def run(*argv, workdir=True):
        seen.clear()
        status = run_command(main, [*argv, *([f"--workdir={tmp_path / 'run'}"] if workdir else [])])
        out, error = capsys.readouterr()
        assert out == ""
        return status, error, seen.get("stages"), seen.get("workdir")

    return run


def get_error(result) -> str:
    """Checks that the input was refused; returns the error line."""
    status, error, stages, _ = result
    assert status == 2
    assert stages is None
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    assert "Traceback" not in error
    return error


def get_stages(result):
    """Checks that the input was accepted; returns the stages."""
    status, error, stages, _ = result
    assert (status, error) == (0, "")
    return stages


# ---- The config file -------------------------------------------------------------------------------------------------


def test_config_and_workdir(run, file, tmp_path):
    status, error, stages, workdir = run(f"--config={file(PLAIN)}")
    assert (status, error) == (0, "")
    assert [stage.steps for stage in stages] == [3]
    assert workdir == tmp_path / "run"
    # Options may also be separated from their values.
    (stage,) = get_stages(run("--config", file(PLAIN), "--workdir", "elsewhere", "--config.seed", "4", workdir=False))
    assert stage.seed == 4


def test_config_arguments(run, file):
    (stage,) = get_stages(run(f"--config={file(PLAIN)}:steps=8,name=other"))
    assert (stage.steps, stage.name) == (8, "other")
    assert "did you mean 'steps='" in get_error(run(f"--config={file(PLAIN)}:stps=8"))
    assert "steps='x' should be of type int" in get_error(run(f"--config={file(PLAIN)}:steps=x"))


def test_config_by_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = get_stages(run("--config=demo:steps=3", "--config.seed=4"))
    assert [(stage.name, stage.steps, stage.seed) for stage in stages] == [("pretrain", 3, 4), ("finetune", 3, 4)]
    (tmp_path / "demo").write_text(PLAIN)  # a local file takes precedence
    assert [stage.steps for stage in get_stages(run("--config=demo"))] == [3]


@pytest.mark.parametrize("path", ["nowhere.py", "nowhere/at/all.py", ".", ""])
def test_missing_config_file(run, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = get_error(run(f"--config={path}"))
    assert error.startswith("error: The config file cannot be loaded: ")
    assert path in error
    # Overrides do not change the message.
    assert get_error(run(f"--config={path}", "--config.seed=3")) == error
    assert get_error(run(f"--config={path}", "--config.optimizer.b1=0.5")) == error


def test_invalid_config_files(run, tmp_path, monkeypatch):
    (tmp_path / "dangling.py").symlink_to("nowhere.py")
    (tmp_path / "round.py").symlink_to("round.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "linked.py").symlink_to("folder.py")
    (tmp_path / "binary.py").write_bytes(b"\x7fELF\x00\x01\xff")
    (tmp_path / "latin.py").write_bytes(b"x = 'caf\xe9'\n")
    monkeypatch.chdir(tmp_path)
    for name, sentence in {
        "dangling.py": r"cannot be loaded: dangling\.py is a link to nowhere\.py, which does not exist\.$",
        "nowhere.py:steps=3": r"cannot be loaded: nowhere\.py does not exist\.$",
        "round.py": r"cannot be loaded: round\.py: Too many levels of symbolic links\.$",
        "folder.py": r"cannot be loaded: folder\.py: Is a directory\.$",
        "linked.py": r"cannot be loaded: linked\.py: Is a directory\.$",
        "a" * 300: r"cannot be loaded: a+… 100 characters …a+: File name too long\.$",
        "binary.py": r"cannot be read: .*null bytes",
        "latin.py": r"cannot be read: .*'utf-8' codec can't decode.*latin\.py",
        "https://host/a.py": r"cannot be loaded: https://host/a\.py is a URL, but a config must be a file on this",
        "gs://bucket/a.py:steps=3": r"cannot be loaded: gs://bucket/a\.py:steps=3 is a URL",
    }.items():
        for argv in ([f"--config={name}"], ["--config", name]):
            sys.modules.pop("config_config", None)
            assert re.search(sentence, get_error(run(*argv)), re.MULTILINE), name

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied", "private.py")

    monkeypatch.setattr(config_flags, "_load_source", deny)  # the tests may run as root, who can read everything
    assert "cannot be loaded: private.py: Permission denied." in get_error(run("--config=private.py"))


BROKEN = {
    "syntax": ("def get_config(:\n", r"cannot be read: .*config\.py, line 1"),
    "name": ("def get_config(arg=None):\n    return oops\n", r"line 2: NameError: name 'oops' is not defined"),
    "top": ("oops\n", r"line 1: NameError: name 'oops' is not defined"),
    "import": ("import no_such_module\n", r"line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    "zero": ("def get_config(arg=None):\n    1 / 0\n", r"line 2: ZeroDivisionError: division by zero"),
    "value": ("def get_config(arg=None):\n    int('x')\n", r"line 2: ValueError: invalid literal for int"),
    "type": ("def get_config(arg=None):\n    1 + 'x'\n", r"line 2: TypeError: unsupported operand"),
    "file": ("def get_config(arg=None):\n    open('nowhere')\n", r"line 2: FileNotFoundError: .*'nowhere'"),
    "lines": ("def get_config(arg=None):\n    raise RuntimeError('a\\nb')\n", r"line 2: RuntimeError: a b"),
    "no function": ("config = 3\n", r"needs a function get_config\(arg\) that returns a ConfigDict"),
    "no config": ("def get_config(arg=None):\n    return 3\n", r"needs a function get_config\(arg\) that returns a"),
    "signature": ("def get_config(a, b):\n    pass\n", r"get_config\(\) missing 2 required positional arguments"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_failing_config_file_is_reported_with_its_line(run, file, name):
    text, sentence = BROKEN[name]
    assert re.search(sentence, get_error(run(f"--config={file(text)}")))


def add_line(line):
    return PLAIN.replace("    return config\n", f"    {line}\n    return config\n")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("config.stps = 3", r'line 9: .*"stps" does not exist .*Did you mean "steps"'),
        ("config.optimizer.learnin_rate = 3", r'line 9: .*Did you mean "learning_rate"'),
        ("config.optimizer.update(learnin_rate=3)", r'line 9: .*Did you mean "learning_rate"'),
        ("config.model.fusion.update(kernal=3)", r'line 9: .*Did you mean "kernel"'),
        ("config.steps = 'many'", r"line 9: TypeError: Could not override field 'steps'"),
        ("config.stages = {'one': {'stps': 3}}; config.run = ('one',)", r"stages\.one\.stps: did you mean 'steps'"),
        ("config.data.aspect = 'squar'", r"data\.aspect is 'squar': did you mean 'square'"),
        ("parse_arg('stps=3', steps=3)", r"'stps=3' is not known; did you mean 'steps='"),
    ],
)
def test_invalid_keys_and_values_in_a_config_file(run, file, line, sentence):
    error = get_error(run(f"--config={file(add_line(line))}"))
    assert re.search(sentence, error), error
    assert len(error) < 400


# ---- Options ---------------------------------------------------------------------------------------------------------


def test_missing_options(run, file):
    assert "--config is missing" in get_error(run())
    assert "--workdir is missing" in get_error(run(f"--config={file(PLAIN)}", workdir=False))


def test_unknown_options(run, file):
    config = f"--config={file(PLAIN)}"
    assert "Unknown command line flag 'wokdir'. Did you mean: workdir" in get_error(run(config, "--wokdir=a"))
    assert "Unknown command line flag 'confg.steps'" in get_error(run(config, "--confg.steps=3"))
    assert "Unexpected argument 'extra'" in get_error(run(config, "extra"))
    assert "Unexpected argument 'steps=3'" in get_error(run(config, "steps=3"))


def test_help(capsys, file):
    for argv in (["--help"], ["-h"], [], [f"--config={file(PLAIN)}", "--help"]):
        with pytest.raises(SystemExit) as stop:
            run_command(lambda argv: parse(argv, HELP), argv)
        assert stop.value.code == 0
        assert capsys.readouterr() == (HELP, "")


def test_a_package_that_is_not_installed_is_named(capsys):
    def main(argv):
        import absent_package.part  # noqa: F401

    assert run_command(main, []) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: This command needs absent_package, which is not installed: make .venv/ready")

    def buggy(argv):
        import stf_jax.absent  # noqa: F401

    with pytest.raises(ModuleNotFoundError, match=r"stf_jax\.absent"):
        run_command(buggy, [])


def test_bugs_keep_their_traceback(capsys):
    def main(argv):
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run_command(main, [])
    assert capsys.readouterr() == ("", "")


def test_run_command_reads_sys_argv(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["command", "--a", "b"])
    assert run_command(seen.append) == 0
    assert seen == [["--a", "b"]]


def test_run_command_prints_user_errors(capsys):
    def main(argv):
        raise UserError("No such thing; make one.")

    assert run_command(main, []) == 2
    assert capsys.readouterr() == ("", "error: No such thing; make one.\n")


def test_parser_errors_have_the_same_form(capsys):
    def main(argv):
        parser = Parser(prog="command")
        parser.add_argument("--count", type=int, required=True)
        parser.parse_args(argv)

    assert run_command(main, ["--count=3"]) == 0
    for argv in ([], ["--count=x"], ["--count=3", "--cuont=4"]):
        assert run_command(main, argv) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: [A-Z][^\n]+; see --help\.\n", error), error


# ---- Overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["--config.steps=9"], "steps", 9),
        (["--config.steps", "9"], "steps", 9),
        (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--config.optimizer.learning_rate=1e-4"], "optimizer.learning_rate", 1e-4),
        (["--config.data.packing=true"], "data.packing", True),
        (["--config.data.packing"], "data.packing", True),
        (["--config.model.scan_layers=false"], "model.scan_layers", False),
        (["--noconfig.model.scan_layers"], "model.scan_layers", False),
        (["--config.name=a name"], "name", "a name"),
        (["--config.init_from="], "init_from", ""),
        (["--config.model.fusion.taps=(3,2)"], "model.fusion.taps", (3, 2)),
        (["--config.model.fusion.taps=3,2"], "model.fusion.taps", (3, 2)),
        (["--config.model.fusion.taps=(3,)"], "model.fusion.taps", (3,)),
        (["--config.model.fusion.taps=()"], "model.fusion.taps", ()),
        (["--config.init_missing=('fusion/.*',)"], "init_missing", ("fusion/.*",)),
        (["--config.rules=(('a','train'),('.*','freeze'))"], "rules", (("a", "train"), (".*", "freeze"))),
        (["--config.mesh.data=-1", "--config.mesh.fsdp=2"], "mesh.fsdp", 2),
    ],
)
def test_overrides(run, file, overrides, key, value):
    (stage,) = get_stages(run(f"--config={file(PLAIN)}", *overrides))
    for part in key.split("."):
        stage = getattr(stage, part)
    assert stage == value
    assert type(stage) is type(value)


def test_overrides_of_stages(run, file):
    config = f"--config={file(STAGED)}"
    text, captions = get_stages(
        run(
            config,
            "--config.stages.text.optimizer.learning_rate=0.5",
            "--config.stages.captions.steps=7",
            "--config.stages.captions.model.fusion.taps=(1,)",
            "--config.seed=5",
        )
    )
    assert (text.steps, text.optimizer.learning_rate, text.seed) == (3, 0.5, 5)
    assert (captions.steps, captions.model.fusion.taps, captions.seed) == (7, (1,), 5)
    assert [stage.name for stage in get_stages(run(config, "--config.run=('captions',)"))] == ["captions"]
    assert [stage.name for stage in get_stages(run(config, "--config.run=('captions','text')"))] == ["captions", "text"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.stps=9", r"config key 'stps': did you mean 'steps'"),
        ("-config.stps=9", r"config key 'stps': did you mean 'steps'"),
        ("--noconfig.data.paking", r"config key 'data\.paking': did you mean 'data\.packing'"),
        ("--config.model.fusion.tap=(3,)", r"did you mean 'model\.fusion\.taps'"),
        ("--config.optimiser.learning_rate=1", r"did you mean 'optimizer\.learning_rate'"),
        ("--config.learning_rate=1", r"Unknown config key 'learning_rate'.*optimizer\.learning_rate"),
        ("--config.steps.more=1", r"config key 'steps\.more': did you mean 'steps'"),
        ("--config.steps=many", r"--config\.steps=many"),
        ("--config.steps=1.5", r"--config\.steps=1\.5"),
        ("--config.steps=", r"--config\.steps="),
        ("--config.data.packing=maybe", r"--config\.data\.packing=maybe"),
        (
            "--config.optimizer=3",
            r"--config\.optimizer=3 sets a group of keys: set one of .*optimizer\.learning_rate",
        ),
        ("--config.model.fusion=mlp", r"did you mean --config\.model\.fusion\.fusion=mlp\?"),
        ("--config.mesh=8", r"set one of --config\.mesh\.data, --config\.mesh\.fsdp, --config\.mesh\.tensor\."),
        ("--config.data=rows.json", r"set one of --config\.data\.annotations, "),
        ("--config.optimizer=adamw", r"set one of .*--config\.optimizer\.learning_rate, "),
        ("--config.model.fusion.taps=('a',)", r"model\.fusion\.taps is 'a', which is not of type int"),
        ("--config.rules=(1,2)", r"rules is 1, which is not of type tuple"),
        ("--config.steps=-1", r"steps is -1; it must"),
        ("--config.optimizer.schedule=cosin", r"did you mean 'cosine'"),
        ("--config.=3", r"cannot be used"),
    ],
)
def test_invalid_overrides(run, file, override, sentence):
    for text in (PLAIN, STAGED):
        error = get_error(run(f"--config={file(text)}", override))
        if text is PLAIN:
            assert re.search(sentence, error), error


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.stages.text.model.fusion=mlp", r"mean --config\.stages\.text\.model\.fusion\.fusion=mlp\?"),
        ("--config.stages.text.mesh=8", r"set one of --config\.stages\.text\.mesh\.data, "),
        ("--config.stages.text.optimizer=adamw", r"set one of .*--config\.stages\.text\.optimizer\.learning_rate, "),
        ("--config.stages.text.stps=9", r"config key 'stps': did you mean 'steps'"),
        ("--config.stages.text.optimizer.learnin_rate=9", r"did you mean 'optimizer\.learning_rate'"),
        ("--config.stages.txt.steps=9", r"does not set stages\.txt\.steps; set it for all stages as steps"),
        ("--config.stages.text.seed=9", r"does not set stages\.text\.seed; set it for all stages as seed"),
        ("--config.stages.text.steps=many", r"--config\.stages\.text\.steps=many"),
        ("--config.steps=9", r"steps is set by stage 'text'; set stages\.text\.steps instead"),
        ("--config.run=('txt',)", r"run names stage 'txt': did you mean 'text'"),
    ],
)
def test_invalid_overrides_of_stages(run, file, override, sentence):
    error = get_error(run(f"--config={file(STAGED)}", override))
    assert re.search(sentence, error), error
    # A valid override before it is not blamed.
    assert get_error(run(f"--config={file(STAGED)}", "--config.stages.text.steps=4", override)) == error


@pytest.mark.parametrize(("option", "key"), [("stages.text", "stages.text.steps"), ("stages", "stages.NAME.steps")])
def test_value_for_a_complete_stage_suggests_a_key(run, file, option, key):
    error = get_error(run(f"--config={file(STAGED)}", f"--config.{option}=5"))
    assert f"--config.{option}=5 sets a group of keys: name one, such as --config.{key}." in error


# ---- Paths -----------------------------------------------------------------------------------------------------------

INVALID_PATHS = [
    ("https://host/model", "https://host/model is a URL; give a local path, or one in a bucket: gs://… or s3://…"),
    ("http://host/a.json", "is a URL"),
    ("hf://owner/model", "hf://owner/model is a URL"),
    ("hf://datasets/owner/set/rows.json", "is a URL"),
    ("az://container/run", "is a URL"),
    ("GS://bucket/run", "GS://bucket/run is a URL; give .* gs://"),
    ("gs:/bucket/run", "is a URL; give .* gs://"),
    ("https:/host/model", "is a URL"),
    ("data:image/png;base64," + "A" * 5000, "^data:image/png;base64,A+… is a URL"),
    ("file:///data/model", "give the path itself, /data/model"),
    ("file://localhost/data/model", "give the path itself, /data/model"),
    ("gs://", "names no bucket; it should be gs://BUCKET/FOLDER"),
    ("", "The path is empty"),
    ("a" * 300, "cannot be accessed: File name too long"),
    ("a\0b", "cannot be accessed: embedded null byte"),
]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("an invalid path opens a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize(("text", "sentence"), INVALID_PATHS)
def test_invalid_paths(text, sentence, no_network):
    with pytest.raises(UserError, match=sentence) as refusal:
        to_path(text)
    assert len(str(refusal.value)) < 300
    for parse_path in (path, local_path):
        with pytest.raises(argparse.ArgumentTypeError, match=sentence):
            parse_path(text)


def test_link_loops_and_inaccessible_folders_are_refused(tmp_path, monkeypatch):
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match="round' cannot be accessed: Too many levels of symbolic links"):
        to_path(tmp_path / "round")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert to_path(tmp_path / "dangling") == tmp_path / "dangling"  # a path need not exist

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", deny)  # the tests may run as root
    with pytest.raises(UserError, match="cannot be accessed: Permission denied"):
        to_path("/private/folder")


def test_valid_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_path("~/runs") == tmp_path / "runs"  # a shell does not expand it in --workdir=~/runs
    for text in ("a", "./a:b", "a,b", "/tmp/x=1", "C:/x", "d\u00fc/\u6c34"):
        assert os.fspath(to_path(text)) == os.path.normpath(text)
    assert os.fspath(to_path("gs://bucket/run")) == "gs://bucket/run"
    assert path_text("./a") == "./a"
    assert path_text("") == ""  # the option may be omitted
    with pytest.raises(argparse.ArgumentTypeError, match="gs://bucket/run is in a bucket"):
        local_path("gs://bucket/run")
    with pytest.raises(UserError, match="nowhere does not exist"):
        require(to_path(tmp_path / "nowhere"))
    (tmp_path / "dangling").symlink_to("blobs/1")
    with pytest.raises(UserError, match="dangling is a link to blobs/1, which does not exist; give a folder or file"):
        require(to_path(tmp_path / "dangling"))


def test_bucket_without_its_package(monkeypatch):
    def fail(scheme):
        raise ImportError

    monkeypatch.setattr("fsspec.get_filesystem_class", fail)
    with pytest.raises(UserError, match=r"s3://bucket/run needs a package that is not installed: pip install s3fs"):
        to_path("s3://bucket/run")


CONFIGS = {
    "init_from": lambda text: TrainConfig(init_from=text),
    "data.annotations": lambda text: TrainConfig(data=DataConfig(annotations=text)),
    "data.images": lambda text: TrainConfig(data=DataConfig(images=text)),
    "data.tokenizer": lambda text: TrainConfig(data=DataConfig(tokenizer=text)),
    "eval.data": lambda text: TrainConfig(eval=dataclasses.replace(TrainConfig().eval, data=text)),
    "model.vision": lambda text: TrainConfig(model=ModelConfig(vision=text)),
    "model.llm": lambda text: TrainConfig(model=ModelConfig(llm=text)),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_all_paths_of_a_config_are_checked(key, no_network):
    check_paths(TrainConfig())
    check_paths(CONFIGS[key]("nowhere"))
    with pytest.raises(UserError, match=f"Config key {key}: https://host/x is a URL"):
        check_paths(CONFIGS[key]("https://host/x"))


@pytest.mark.parametrize("key", ["init_from", "data.annotations", "data.images"])
def test_comma_in_a_path_is_refused(key, tmp_path):
    for name in ("a,b", "c"):
        (tmp_path / name).mkdir()
    for text in (f"{tmp_path}/a,b", f"{tmp_path}/c, {tmp_path}/a,b", f"{tmp_path}/a,b,{tmp_path}/c"):
        with pytest.raises(UserError, match=rf"Config key {key}: {tmp_path}/a,b has a comma in its name"):
            check_paths(CONFIGS[key](text))
    check_paths(CONFIGS[key](f"{tmp_path}/c,{tmp_path}/d"))
    check_paths(CONFIGS["data.tokenizer"](f"{tmp_path}/a,b"))  # a single path


# ---- The process -----------------------------------------------------------------------------------------------------


def test_unused_device_packages(tmp_path, monkeypatch):
    files = {name: str(tmp_path / name) for name in ("tpu0", "nvidia0")}
    (tpu, *_), (cuda, *_) = environment._DEVICES
    devices = ((tpu, (files["tpu0"],), ("libtpu",)), (cuda, ("/nowhere", files["nvidia0"]), ("plugin", "other")))
    monkeypatch.setattr(environment, "_DEVICES", devices)
    assert environment.unused_device_packages("") == ["libtpu", "plugin", "other"]
    assert environment.unused_device_packages("cpu") == ["libtpu", "plugin", "other"]
    assert environment.unused_device_packages("tpu,cpu") == ["plugin", "other"]
    assert environment.unused_device_packages("cuda") == environment.unused_device_packages("gpu,cpu") == ["libtpu"]
    pathlib.Path(files["nvidia0"]).touch()
    assert environment.unused_device_packages("") == ["libtpu"]
    pathlib.Path(files["tpu0"]).touch()
    assert environment.unused_device_packages("") == []


CHECK_COMMANDS = r"""
import contextlib, importlib, io, sys
from stf_jax.cli import run_command

INVALID = {
    "main": [["--workdir=https://host/x", "--config=configs/demo.py"], ["--config=configs/demo.py", "--workdir=/x",
             "--config.model.lm=vicuna-7b"]],
    "prepare": [["--annotations=hf://o/x.json", "--images=a", "--out=b"], ["--annotations=a", "--images=b"]],
    "evaluate": [["--benchmark=nonsense", "--answers=/dev/null", "--out=x"], ["--benchmark=gqa",
                 "--checkpoint=/nowhere", "--out=x"], ["--benchmark=scenes", "--answers=/nowhere", "--out=x"]],
    "chat": [["--checkpoint=/nowhere"], ["--checkpoint=.", "--image=/nowhere.png"]],
    "convert": [["export", ".", "--format=nonsense", "--to=x"], ["import", "/nowhere", "--to=x"], ["nonsense"]],
    "plan": [["--config=configs/pretrain.py", "--what=nonsense"], ["--config=configs/pretrain.py"],
             ["--config=configs/pretrain.py", "--topology=h10:8"],
             ["--config=configs/pretrain.py", "--topology=v5e:8"]],
    "bench": [["nonsense"], ["cost", "--plot=/nowhere/a.png"], ["step", "--rows=x"], ["weights", "--scratch=hf://x"],
              ["plan", "--topology=h10:8"]],
    "ablate": [["--config=configs/ablations/fusions.py"], ["--nonsense"]],
    "compare": [["results"], ["--out=out"], ["results", "--out=out", "--margin=0"]],
}
HEAVY = {"jax", "transformers", "torch", "flax", "orbax", "grain", "tensorflow_datasets", "scipy", "matplotlib"}
for name, lines in INVALID.items():
    command = importlib.import_module(f"stf_jax.{name}")
    for argv in [["--help"], *([name, "--help"] for name in getattr(command, "_BENCHES", [])), *lines]:
        stderr = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            try:
                status = run_command(command.main, argv)
            except SystemExit as stop:
                status = stop.code
        assert status == (0 if "--help" in argv else 2), (name, argv, status)
        assert stderr.getvalue().count("\n") == bool(status), (name, argv, stderr.getvalue())
        assert not HEAVY & set(sys.modules), (name, argv, HEAVY & set(sys.modules))
        sys.modules.pop("config_config", None)
import jax, transformers
assert jax.devices()
"""


def test_commands_check_arguments_before_slow_imports():
    """Nor do device packages print anything."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    root = pathlib.Path(__file__).parents[2]
    env = inherited | {"JAX_NUM_CPU_DEVICES": "", "XLA_FLAGS": ""}  # empty counts as unset
    done = subprocess.run([sys.executable, "-c", CHECK_COMMANDS], cwd=root, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_long_messages_are_shortened(capsys):
    def main(argv):
        raise UserError(f"{'x' * 10**6} is wrong; right is y.")

    assert run_command(main, []) == 2
    printed = capsys.readouterr().err
    assert len(printed) < 2100
    assert printed.startswith("error: xxx")
    assert printed.endswith("right is y.\n")


def test_closed_output_pipe_is_no_error():
    # The second prints argparse's help, which ignores the closed pipe.
    for argv, status in ((["stf_jax.main", "--help"], 141), (["stf_jax.convert", "import", "--help"], 0)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, "-m", *argv], stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert (done.returncode, done.stderr) == (status, b"")


def test_other_broken_pipes_are_bugs():
    def main(argv):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command(main, [])
