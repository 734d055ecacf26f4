"""Every documented command exists and accepts its options; a quick one runs in a clean environment.

Fenced blocks have a language: ``sh`` for commands, ``python``, or ``text`` for output and anything else.
"""

import ast
import importlib
import os
import pathlib
import re
import runpy
import shlex
import subprocess

import docs_environment
import pytest

from stf_jax import cli
from stf_jax import config as config_module
from stf_jax.config import default_config, flatten
from stf_jax.evals.registry import BENCHMARKS, benchmark_groups
from stf_jax.models.spec import llm_preset, vision_preset
from stf_jax.studies import study
from stf_jax.training import stages

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "stf_jax/weights/miniatures/README.md"]
# Files whose docstrings and help texts contain commands.
CODE_FILES = [
    *sorted((ROOT / "stf_jax").glob("*.py")),
    *sorted((ROOT / "configs").rglob("*.py")),
    ROOT / "tests/make_llava.py",
]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch/slurm.sbatch", ROOT / "launch/Dockerfile"]
# External programs, and why this test does not run them.
EXTERNAL = {
    "accelerate": "lmms-eval needs to download data; tests/weights/test_lmms_eval.py evaluates an export with it",
    "cp": "copies files of the reader",
    "cd": "enters a folder of the reader",
    "curl": "queries a server, which make test-serve tests",
    "docker": "needs a daemon; tests/launch checks the Dockerfile",
    "echo": "writes to a file of the reader",
    "find": "unpacks archives of runs; tests/studies/test_report.py makes a report of what they contain",
    "gcloud": "needs an account",
    "pip": "installs packages; the requirement files must exist",
    "hf": "downloads data sets from the Hub",
    "mkdir": "makes a folder of the reader",
    "mpirun": "needs Open MPI",
    "vllm": "has a separate environment, which make test-serve tests",
}
# Values to check placeholders with. "…" and "..." alone stand for more options.
PLACEHOLDERS = {
    "--config=gated_pool_study.py:seeds=2": "--config=examples/gated_pool_study.py:seeds=2",
    "--config=…": "--config=configs/demo.py",
    "--config=FILE": "--config=configs/demo.py",
    "--benchmark=NAME": "--benchmark=pope",
    "--topology=NAME": "--topology=h200:8",
    "--name=NAME": "--name=stf",
    "--config=configs/STAGE.py:llm=vicuna-SIZE": "--config=configs/finetune.py:llm=vicuna-7b",
    "--config.KEY=VALUE": None,
    "…": None,
    "...": None,
}


class _ArgumentsParsed(Exception):
    """A command has parsed its arguments and would start to work."""


def read_blocks(file: pathlib.Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", file.read_text(), re.MULTILINE | re.DOTALL)


def split_commands(text: str) -> list[list[str]]:
    """Splits shell text into the words of each command, without comments and with continued lines joined."""
    commands, part = [], ""
    for line in re.sub(r" *\\\n *", " ", text).splitlines(keepends=True):
        part += line
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            continue  # a quoted string continues on the next line
        commands, part = [*commands, *([words] if words else [])], ""
    assert not part, part
    return commands


def _commands_in_docs():
    for file in DOCS:
        text = file.read_text()
        commands = [
            words for language, block in read_blocks(file) if language == "sh" for words in split_commands(block)
        ]
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        starts = ("python -m ", "make ", "launch/", "DEVICES=", "sbatch ", "mpirun ", "--config.")
        commands += [shlex.split(span) for span in spans if span.startswith(starts)]
        yield from ((file.relative_to(ROOT), words) for words in commands)


def _commands_in_code():
    for file in CODE_FILES:
        texts = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
        texts = [re.sub(r" *\\\n *", " ", text) for text in texts if isinstance(text, str)]
        for text in texts:
            matches = re.findall(r"``(python -m [^`]+)``|^ +(python -m .*)$", text, re.MULTILINE)
            yield from ((file.relative_to(ROOT), shlex.split("".join(match))) for match in matches)
    for file in SCRIPTS:
        for line in re.findall(
            r"^#  +((?:[A-Z]+=\d+ )*(?:launch/|sbatch |docker ).*)$", file.read_text(), re.MULTILINE
        ):
            yield file.relative_to(ROOT), shlex.split(line, comments=True)


COMMANDS = [*_commands_in_docs(), *_commands_in_code()]


def _fill_placeholders(words):
    """Replaces placeholders, and removes optional arguments in brackets."""
    text = re.sub(r"\[[^][]*\]", "", "\0".join(words))
    return [PLACEHOLDERS.get(word, word) for word in text.split("\0") if word and PLACEHOLDERS.get(word, word)]


def _check_python(words, monkeypatch):
    """``python -m MODULE …``: the module accepts the arguments and would start to work."""
    assert words[0] == "-m", "docs run modules, so that Python finds the package"
    name, *argv = words[1:]
    if name in ("pip", "pytest"):
        files = [word for word in argv if word.endswith(".txt") or word.startswith("tests/")]
        assert all((ROOT / file).exists() for file in files)
        return
    if name.startswith("tests."):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists()
        return
    if name.partition(".")[0] in EXTERNAL:
        return
    module = importlib.import_module(name)
    if not argv:
        return  # only mentioned
    argv = ["fusion" if (name, word) == ("stf_jax.bench", "NAME") else word for word in argv]
    if name == "stf_jax.ablate":
        argv = [word.replace("configs/demo.py", "configs/ablations/fusions.py") for word in argv]
    parsed = {}

    def stop_after(function, key):
        def wrapped(*args, **kwargs):
            parsed[key] = function(*args, **kwargs)
            raise _ArgumentsParsed

        return wrapped

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tests" / "plugins")  # the reader's own folder
    monkeypatch.setattr(cli.Parser, "parse_args", stop_after(cli.Parser.parse_args, "options"))
    for owner, key in ((config_module, "resolve"), (stages, "resolve_stages"), (study, "read_study")):
        wrapped = stop_after(getattr(owner, key), key)
        monkeypatch.setattr(owner, key, wrapped)
        if hasattr(module, key):
            monkeypatch.setattr(module, key, wrapped)
    if "--status" in argv:
        monkeypatch.setattr(module, "format_status", stop_after(str, "status"))
    with pytest.raises(_ArgumentsParsed):
        module.main(argv)
    for stage in parsed.get("resolve", parsed.get("resolve_stages", ())):
        _check_presets(stage)
    if name == "stf_jax.evaluate":
        assert set(parsed["options"].benchmark.split(",")) <= {*BENCHMARKS.known, *benchmark_groups()}


def _check_presets(stage):
    """Checks that backbones are presets, or folders that previous commands write."""
    for value, load in ((stage.model.vision, vision_preset), (stage.model.llm, llm_preset)):
        assert value.startswith("weights/") or load(value), value


def _check_overrides(words, monkeypatch):
    """``--config.KEY=VALUE`` alone; without a value, or with "…", checks only the key."""
    keys = [word.removeprefix("--config.").partition("=")[0] for word in words]
    if set(keys) <= set(flatten(study.default_study().to_dict())) - set(flatten(default_config().to_dict())):
        return _check_python(
            ["-m", "stf_jax.ablate", "--config=configs/ablations/fusions.py", "--out=DIR", *words], monkeypatch
        )
    assert set(keys) <= set(flatten(default_config().to_dict()))
    words = [word for word in words if "=" in word and not word.endswith("=…")]
    words = ["--config=configs/finetune.py", "--workdir=DIR", *words]
    return _check_python(["-m", "stf_jax.main", *words], monkeypatch)


def _check_make(words):
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


def _check_script(words, monkeypatch):
    """``launch/…``: the script exists and accepts its options, and the program accepts those passed to it."""
    script, *rest = words
    assert os.access(ROOT / script, os.X_OK), script
    if script in ("launch/tpu_pod.sh", "launch/gke.sh"):
        options, program = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
        options = [word for word in options if word != "…"]
        if not any(word.startswith("--") for word in options) or "COMMAND" in options:
            return  # only mentioned
        options = _fill_placeholders(options)
        for action in options[0].split("|"):
            line = [
                "bash",
                str(ROOT / script),
                action,
                *options[1:],
                "--dry-run",
                *(["--", *program] if program else []),
            ]
            done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
            assert done.returncode == 0, done.stderr
    elif script == "launch/install.sh":
        assert rest in (["tpu"], ["cuda12"])
        return
    elif script == "launch/restart.sh":
        program = rest[3:] if rest and "python" in rest[0] else []
    elif script == "launch/tpu_worker.sh":
        program = rest[1:]
    else:
        program = rest
    if program:
        program = _fill_placeholders(program)
        hosts = ("--coordinator=", "--processes=", "--process=")
        arguments = [word for word in program if not word.startswith(hosts)]
        arguments += [] if any(word.startswith("--config=") for word in arguments) else ["--config=configs/demo.py"]
        arguments += [] if any(word.startswith("--workdir=") for word in arguments) else ["--workdir=DIR"]
        _check_python(
            ["-m", "stf_jax.main", *arguments, *(word for word in program if word.startswith(hosts))], monkeypatch
        )


def _check_sbatch(words, monkeypatch):
    script = next(index for index, word in enumerate(words) if not word.startswith("--"))
    _check_script(words[script:], monkeypatch)


@pytest.mark.parametrize(
    ("file", "words"), COMMANDS, ids=[f"{file}-{' '.join(words)[:80]}" for file, words in COMMANDS]
)
def test_commands_accept_their_documented_arguments(file, words, monkeypatch):
    while re.fullmatch(r"[A-Z]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "python":
        _check_python(_fill_placeholders(rest), monkeypatch)
    elif program == "make":
        _check_make(rest)
    elif program == "sbatch":
        _check_sbatch(rest, monkeypatch)
    elif program.startswith("launch/"):
        _check_script(words, monkeypatch)
    elif program.startswith("--config."):
        _check_overrides(_fill_placeholders(words), monkeypatch)
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    else:
        assert program in EXTERNAL, f"{file}: {program} is not checked; see EXTERNAL"
        files = [word.removeprefix("--file=") for word in rest if word.startswith("--file=") or word.endswith(".txt")]
        assert all((ROOT / name).exists() for name in files)


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_blocks_have_a_known_language(file):
    for language, block in read_blocks(file):
        assert language in ("sh", "python", "text"), block
        if language == "python":
            program = compile(block, file, "exec")
            if "import" not in block:  # keys of a config
                config = default_config()
                exec(program, {"config": config})
                config_module.resolve(config)


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_link_targets_exist(file):
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / path).exists(), path


def test_docs_activate_one_environment():
    """README says how; the commands of the docs run in the active environment."""
    assert README.read_text().count("\n. .venv/bin/activate\n") == 1
    for file in DOCS:
        assert ".venv/bin/" not in file.read_text().replace(". .venv/bin/activate", ""), file


def test_the_first_command_of_the_rehearsal_runs_in_a_clean_environment():
    """Without its folder it prints its usage; tests/test_reproduce.py runs the complete rehearsal."""
    (*first, _), *_ = next(
        split_commands(text) for language, text in read_blocks(ROOT / "docs/reproduce.md") if language == "sh"
    )
    assert first == ["python", "-m", "tests.make_llava"]
    done = subprocess.run(
        first, cwd=ROOT, env=docs_environment.make_environment(), capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Makes a small data set in LLaVA's exact schema: ")


def test_configuration_page_is_generated_from_the_code():
    made = runpy.run_path(str(ROOT / "docs/make_configuration.py"))
    assert (ROOT / "docs/configuration.md").read_text() == made["page"](), "run make docs"
    keys = [key for key in flatten(default_config().to_dict()) if not key.startswith(("run", "stages"))]
    assert [key for key in keys if f"| `{key}` |" not in made["page"]()] == []
