"""The device check runs without the packages for configs and data, and each of its parts writes its lines."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import device_check

# Refuses what a machine with jax, flax, optax, orbax, transformers and torch may lack, then runs the script.
WITHOUT = """
import importlib.abc, runpy, sys
class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Lacking())
sys.argv[1:] = ["--tiny", "--out={out}"]
runpy.run_module("benchmarks.device_check", run_name="__main__")
"""
LACKING = ("ml_collections", "grain", "array_record", "gguf", "cykooz", "cykooz_resizer", "tensorflow_datasets")
STEPS = {"step_seconds", "positions_per_second", "compile_seconds", "planned_gib", "peak_gib", "mfu", "compute_share"}
KEYS = {
    "device": {"platform", "device", "jax"},
    "attention": {"kernel", "differences", "within"},
    "stage 1": STEPS,
    "stage 2": STEPS,
    "remat": STEPS,
    "packing": STEPS,
    "decoder": STEPS,
    "torch": {"step_seconds", "compile_seconds", "compiled", "peak_gib"},
    "deterministic": STEPS | {"checksum"},
    "deterministic, again": STEPS | {"checksum"},
    "answers": {"image_ms", "prefill_ms", "first_token_ms", "tokens_per_second", "memory_share"},
    "targets": {"figure", "target", "met"},
    "summary": {"figure"},
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    script = WITHOUT.format(lacking=LACKING, out=folder / "lines")
    # Parts that compile the same program, each in its own process, compile it once.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == (folder / "lines").read_text()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow  # a minute of a core
def test_each_part_writes_its_figures(lines):
    assert {line["part"] for line in lines} == KEYS.keys()
    for line in lines:
        assert not {"failed", "skipped"} & line.keys()
        assert line.keys() >= KEYS[line["part"]]
    assert {line["kernel"] for line in lines if "kernel" in line} == {"xla"}


@pytest.mark.slow  # a minute of a core
def test_decoder_and_torch_train_the_same_model(lines):
    ours, torch = (next(line for line in lines if line["part"] == part) for part in ("decoder", "torch"))
    shapes = device_check.blueprint(device_check._model(device_check._TINY, "mlp", device_check._TINY.layers)).shapes
    assert torch["parameters"] == sum(leaf.size for path, leaf in shapes.items() if path.startswith("llm/"))
    assert (ours["layers"], ours["rows"], ours["positions"]) == (2, 2, 20)
    assert ours["losses"][0] == pytest.approx(torch["losses"][0], abs=0.1)  # both near ln(512), from random weights


@pytest.mark.slow  # a minute of a core
def test_summary_compares_the_lines(lines):
    def get(part, case, key):
        return next(line[key] for line in lines if (line["part"], line["case"]) == (part, case))

    speed = get("targets", "speed, relative to compiled torch", "figure")
    assert speed == pytest.approx(get("torch", "torch", "step_seconds") / get("decoder", "ours", "step_seconds"), 1e-2)
    assert get("targets", "deterministic runs that are equal", "figure") == 1
    assert get("targets", "attention cases within their limit", "met")
    changed = [line | {"checksum": 0} if line["part"] == "deterministic, again" else line for line in lines]
    changed = [line | {"within": False} if line["case"].startswith("37") else line for line in changed]
    targets = {
        line["case"]: line["met"] for line in device_check._summarize(changed, device_check._TINY) if "met" in line
    }
    assert targets["deterministic runs that are equal"] is targets["attention cases within their limit"] is False


def failing(size):
    yield "good", lambda: {"figure": 1}
    yield "bad", lambda: {"figure": 1 / 0}
    yield "next", lambda: {"figure": 2}
    yield "killed", lambda: os._exit(3)


def hanging(size):
    yield "good", lambda: {"figure": 1}
    yield "hangs", lambda: time.sleep(600)


def run_parts():
    """Prints the lines of both, from a process that has not started jax, and of a start without a GPU."""
    begin = time.monotonic()
    for cases, seconds in ((failing, 60), (hanging, 3)):
        for line in device_check._run_part(cases, device_check._TINY, time.monotonic() + seconds):
            print(json.dumps(line))
    assert time.monotonic() - begin < 30
    device_check.main([])


def test_a_part_that_fails_or_hangs_keeps_its_lines_and_a_machine_without_a_gpu_is_refused():
    command = [sys.executable, "-c", "import test_device_check; test_device_check.run_parts()"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("case") for line in lines] == ["good", "bad", "next", None, "good", None, "device"], done.stderr
    assert lines[1]["failed"] == "ZeroDivisionError: division by zero"
    assert lines[3] == {"failed": "the process ended with status 3"}
    assert lines[5] == {"skipped": "the rest, because the part's time is over"}
    assert "Traceback" in done.stderr
    assert done.returncode == 2
    assert done.stderr.endswith("jax finds no GPU here; --tiny runs in miniature on a CPU.\n")


def test_an_unusable_file_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        device_check.main(["--tiny", f"--out={tmp_path / 'absent' / 'lines'}"])
    assert ended.value.code == 2
    assert "No such file or directory." in capsys.readouterr().err
