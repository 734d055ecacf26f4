"""Every command that a document shows exists and takes its options; a quick one runs in a reader's environment.

A fenced block says what it is: ``sh`` for commands, ``python``, or ``text`` for what is only shown.
"""

import ast
import importlib
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import docs_environment

from stf_jax import config as config_module
from stf_jax.config import default_config, flatten
from stf_jax.evals.registry import BENCHMARKS
from stf_jax.models.presets import llm_preset, vision_preset
from stf_jax.runtime import cli
from stf_jax.studies import study
from stf_jax.training import stages

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "stf_jax/weights/miniatures/README.md"]
# Files whose docstrings and help texts show commands.
SHOWING = [
    *sorted((ROOT / "stf_jax").glob("*.py")),
    *sorted((ROOT / "configs").rglob("*.py")),
    ROOT / "tests/make_llava.py",
]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch/slurm.sbatch", ROOT / "launch/Dockerfile"]
# Programs of others, and why a test does not run them.
OTHERS = {
    "accelerate": "lmms-eval's data must be downloaded; tests/weights/test_lmms_eval.py asks an export through it",
    "cp": "of files that the reader has",
    "cd": "into a folder that the reader has",
    "curl": "asks a server, as make test-serve does",
    "docker": "there is no daemon; tests/launch reads the Dockerfile",
    "echo": "into a file that the reader has",
    "gcloud": "needs an account",
    "pip": "installs; its requirement files must be there",
    "mpirun": "needs Open MPI",
    "vllm": "has an environment of its own, in which make test-serve asks it",
}
# What stands for something of the reader's, by what does for a check. "…" and "..." alone stand for more options.
STAND_INS = {
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


class _Read(Exception):
    """A command has read its arguments, and would begin to work."""


def blocks(file: pathlib.Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", file.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell text, comments left out, lines joined."""
    found, part = [], ""
    for line in re.sub(r" *\\\n *", " ", text).splitlines(keepends=True):
        part += line
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            continue  # a text in quotes goes on in the next line
        found, part = [*found, *([words] if words else [])], ""
    assert not part, part
    return found


def _in_docs():
    for file in DOCS:
        text = file.read_text()
        found = [words for language, block in blocks(file) if language == "sh" for words in commands(block)]
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        starts = ("python -m ", "make ", "launch/", "DEVICES=", "sbatch ", "mpirun ", "--config.")
        found += [shlex.split(span) for span in spans if span.startswith(starts)]
        yield from ((file.relative_to(ROOT), words) for words in found)


def _in_code():
    for file in SHOWING:
        texts = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
        texts = [re.sub(r" *\\\n *", " ", text) for text in texts if isinstance(text, str)]
        for text in texts:
            shown = re.findall(r"``(python -m [^`]+)``|^ +(python -m .*)$", text, re.MULTILINE)
            yield from ((file.relative_to(ROOT), shlex.split("".join(one))) for one in shown)
    for file in SCRIPTS:
        for line in re.findall(
            r"^#  +((?:[A-Z]+=\d+ )*(?:launch/|sbatch |docker ).*)$", file.read_text(), re.MULTILINE
        ):
            yield file.relative_to(ROOT), shlex.split(line, comments=True)


SHOWN = [*_in_docs(), *_in_code()]


def _stand_in(words):
    """The words with placeholders filled in, and what stands in brackets (may be given) left out."""
    text = re.sub(r"\[[^][]*\]", "", "\0".join(words))
    return [STAND_INS.get(word, word) for word in text.split("\0") if word and STAND_INS.get(word, word)]


def _check_python(words, monkeypatch):
    """``python -m MODULE …``: the module reads the arguments and would begin to work."""
    assert words[0] == "-m", "docs run modules, so that the packages are found wherever Python is"
    name, *argv = words[1:]
    if name in ("pip", "pytest"):
        files = [word for word in argv if word.endswith(".txt") or word.startswith("tests/")]
        assert all((ROOT / file).exists() for file in files)
        return
    if name.startswith("tests."):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists()
        return
    if name.partition(".")[0] in OTHERS:
        return
    module = importlib.import_module(name)
    if not argv:
        return  # only named
    argv = ["fusion" if (name, word) == ("stf_jax.bench", "NAME") else word for word in argv]
    if name == "stf_jax.ablate":
        argv = [word.replace("configs/demo.py", "configs/ablations/fusions.py") for word in argv]
    read = {}

    def stop_after(do, key):
        def done(*arguments, **more):
            read[key] = do(*arguments, **more)
            raise _Read

        return done

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli.Parser, "parse_args", stop_after(cli.Parser.parse_args, "options"))
    for where, key in ((config_module, "resolve"), (stages, "resolve_stages"), (study, "read_study")):
        wrapped = stop_after(getattr(where, key), key)
        monkeypatch.setattr(where, key, wrapped)
        if hasattr(module, key):
            monkeypatch.setattr(module, key, wrapped)
    if "--status" in argv:
        monkeypatch.setattr(module, "format_status", stop_after(str, "status"))
    with pytest.raises(_Read):
        module.main(argv)
    for stage in read.get("resolve", read.get("resolve_stages", ())):
        _check_presets(stage)
    if name == "stf_jax.evaluate":
        assert set(read["options"].benchmark.split(",")) <= {*BENCHMARKS, "all"}


def _check_presets(stage):
    """Backbones are presets, or folders that the commands before it make."""
    for value, read in ((stage.model.vision, vision_preset), (stage.model.llm, llm_preset)):
        assert value.startswith("weights/") or read(value), value


def _check_overrides(words, monkeypatch):
    """``--config.KEY=VALUE`` by itself; without a value, or with "…" for it, the key alone is looked at."""
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
    """``launch/…``: the script is there, tells its options apart, and what it hands on is the program's."""
    script, *rest = words
    assert os.access(ROOT / script, os.X_OK), script
    if script in ("launch/tpu_pod.sh", "launch/gke.sh"):
        own, program = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
        own = [word for word in own if word != "…"]
        if not any(word.startswith("--") for word in own) or "VERB" in own:
            return  # only named
        own = _stand_in(own)
        for verb in own[0].split("|"):
            line = ["bash", str(ROOT / script), verb, *own[1:], "--dry-run", *(["--", *program] if program else [])]
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
        program = _stand_in(program)
        hosts = ("--coordinator=", "--processes=", "--process=")
        given = [word for word in program if not word.startswith(hosts)]
        given += [] if any(word.startswith("--config=") for word in given) else ["--config=configs/demo.py"]
        given += [] if any(word.startswith("--workdir=") for word in given) else ["--workdir=DIR"]
        _check_python(
            ["-m", "stf_jax.main", *given, *(word for word in program if word.startswith(hosts))], monkeypatch
        )


def _check_sbatch(words, monkeypatch):
    script = next(place for place, word in enumerate(words) if not word.startswith("--"))
    _check_script(words[script:], monkeypatch)


@pytest.mark.parametrize(("file", "words"), SHOWN, ids=[f"{file}-{' '.join(words)[:80]}" for file, words in SHOWN])
def test_commands_take_what_they_are_shown_with(file, words, monkeypatch):
    while re.fullmatch(r"[A-Z]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "python":
        _check_python(_stand_in(rest), monkeypatch)
    elif program == "make":
        _check_make(rest)
    elif program == "sbatch":
        _check_sbatch(rest, monkeypatch)
    elif program.startswith("launch/"):
        _check_script(words, monkeypatch)
    elif program.startswith("--config."):
        _check_overrides(_stand_in(words), monkeypatch)
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    else:
        assert program in OTHERS, f"{file}: {program} is checked by nothing; see OTHERS"
        files = [word.removeprefix("--file=") for word in rest if word.startswith("--file=") or word.endswith(".txt")]
        assert all((ROOT / name).exists() for name in files)


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_blocks_say_what_they_are(file):
    for language, block in blocks(file):
        assert language in ("sh", "python", "text"), block
        if language == "python":
            program = compile(block, file, "exec")
            if "import" not in block:  # keys of a config
                config = default_config()
                exec(program, {"config": config})
                config_module.resolve(config)


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / path).exists(), path


def test_docs_activate_one_environment():
    """README says how, and the docs' commands are those of the active one."""
    assert README.read_text().count("\n. .venv/bin/activate\n") == 1
    for file in DOCS:
        assert ".venv/bin/" not in file.read_text().replace(". .venv/bin/activate", ""), file


def test_the_first_command_of_the_rehearsal_starts_for_a_reader():
    """Without its folder it says what it takes; tests/test_reproduce.py runs the whole rehearsal."""
    (*first, _), *_ = next(commands(text) for language, text in blocks(ROOT / "docs/reproduce.md") if language == "sh")
    assert first == ["python", "-m", "tests.make_llava"]
    done = subprocess.run(
        first, cwd=ROOT, env=docs_environment.make_environment(), capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Makes a small data set in LLaVA's exact schema: ")
