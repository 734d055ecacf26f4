"""The benchmarks run, print the figures they write, and measure what they claim; no test depends on time."""

import argparse
import contextlib
import dataclasses
import http.server
import json
import sys
import threading
import time

import numpy as np
import pytest
import tiny  # noqa: F401 (its presets)

from benchmarks import arguments, cost, decode, flops, idle, process, serve, step
from benchmarks.mixture import SOURCES, jpegs, lengths
from benchmarks.plan import make_variants
from benchmarks.recipes import TEXT, make_stage, make_task
from benchmarks.synthetic import make_export
from stf_jax.bench import main
from stf_jax.cli import run_command
from stf_jax.config import FusionConfig, ModelConfig
from stf_jax.models.blueprint import blueprint
from stf_jax.models.fusions.mlp import MLP
from stf_jax.models.fusions.stf import MBTFSTF
from stf_jax.models.spec import llm_preset, resolve_model, vision_preset
from stf_jax.planning.topology import topology_devices
from stf_jax.table import format_table
from stf_jax.training.flops import step_flops
from stf_jax.weights.model import Description


def test_input(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert run_command(main, ["input", "--images=16", "--rows=20000", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())
    assert capsys.readouterr().out == format_table(rows) + "\n"
    by_name = {row["what"]: row for row in rows}
    assert {name for name in by_name if "LLaVA" in name} == {
        "LLaVA's way, plain loop",
        "LLaVA's way, DataLoader (2 workers)",
        "LLaVA's group_by_modality_length",
    }
    loop = by_name["LLaVA's way, plain loop"]["images_per_second_per_core"]
    for row in rows:
        if "ratio_per_core" in row:
            assert row["ratio_per_core"] == pytest.approx(row["images_per_second_per_core"] / loop)
    # These do not depend on time.
    useful = {row["what"]: row["useful_positions"] for row in rows if "useful_positions" in row}
    assert useful["ours, packed (8 images per row)"] >= 0.95
    assert useful["ours, grouped (8 lengths)"] > useful["LLaVA's group_by_modality_length"]


def test_sources(tmp_path):
    file = tmp_path / "figures.json"
    assert run_command(main, ["sources", "--images=2", "--rows=1000", f"--json={file}"]) == 0
    *sources, planned = json.loads(file.read_text())
    assert (len(sources), sources[0]["ratio"]) == (5, 1)
    # A row has four conversations of over 200 tokens.
    assert planned["steps"] == 2


def test_weights(tmp_path):
    file = tmp_path / "figures.json"
    assert run_command(main, ["weights", "--model=llama-mini", f"--scratch={tmp_path}", f"--json={file}"]) == 0
    rows = {row["what"]: row for row in json.loads(file.read_text())}
    assert len(rows) == 5
    assert rows["import, peak"]["gib"] > rows["model, in bfloat16"]["gib"] > rows["its largest parameter"]["gib"] > 0


def test_look_counts_a_gradient_for_each_token_of_the_answer(tmp_path):
    found = []
    for answer in (1, 2, 3):
        options = [
            "--vision=clip-mini-8-96",
            "--llm=llama-mini-6",
            f"--answer={answer}",
            f"--json={tmp_path / 'f.json'}",
        ]
        assert run_command(main, ["look", *options]) == 0
        found.append({row["what"]: row for row in json.loads((tmp_path / "f.json").read_text())})
    first, second, third = ([rows[name]["answer"] for name in ("mbtf_stf", "mlp")] for rows in found)
    # The second token adds about as much as the third: a backward pass, and a position to each pass.
    np.testing.assert_allclose(np.subtract(third, second), np.subtract(second, first), rtol=0.05)
    assert (np.subtract(second, first) > np.multiply(0.3, first)).all()
    for row in found[0].values():
        assert row["both_images"] == pytest.approx(2 * (row["image_tokens"] + row["answer"]))
    assert [row["tokens"] for row in found[0].values()] == [36, 144]


@pytest.mark.usefixtures("torch_setup")
@pytest.mark.parametrize("fusion", ["mlp", "mbtf_stf"])
def test_decode_gives_both_programs_the_same_prompts(fusion, tmp_path, monkeypatch):
    config = ModelConfig("clip-tiny", "llama-tiny", FusionConfig(fusion), "float32")
    export = tmp_path / "export"
    make_export(config, tmp_path / "imported", export)
    calls, make_prompt = [], decode._prompt
    monkeypatch.setattr(decode, "_prompt", lambda *arguments: calls.append(arguments) or make_prompt(*arguments))
    for program in (decode._ours, decode._transformers):
        figures = program(str(export), 2, 3, "float32")
        assert set(decode._FIGURES) - {"times_transformers", "gib"} <= figures.keys()
        assert min(value for name, value in figures.items() if name != "prefill_ms") > 0  # prefill_ms is a difference
    slots = resolve_model(config).slots
    assert calls == [(2, slots, 128 if fusion == "mlp" else 64), (2, slots, slots + 60)]
    _, image_slots = make_prompt(2, slots, 128)
    assert (image_slots[0] >= 0).sum() == slots
    assert make_prompt(2, slots, slots + 60)[0].shape == (2, slots + 60)


@pytest.mark.usefixtures("torch_setup")
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_step_runs_the_same_steps_in_both_programs(stage, tmp_path):
    config = ModelConfig("clip-tiny", "llama-tiny", FusionConfig("mbtf_stf"), "float32", remat="full")
    export = tmp_path / "export"
    make_export(config, tmp_path / "imported", export)
    task = step.Task(
        str(tmp_path / "imported"), str(export), stage, rows=2, text=12, steps=3, precision="float32", remat="full"
    )
    ours, torch = step.ours(task), step.in_torch(task)
    assert min(ours["step_ms"], torch["step_ms"]) > 0
    # The same model, rows, optimizer and learning rate give the same losses, before the first step and after each.
    assert len(ours["losses"]) == len(torch["losses"]) == 4
    np.testing.assert_allclose(ours["losses"], torch["losses"], rtol=2e-4)
    assert ours["losses"][-1] < ours["losses"][0]


def test_schedules_are_compared_with_none(tmp_path, capsys):
    file, schedule = tmp_path / "figures.json", "vica:layers=0"
    sizes = ["--vision=clip-tiny", "--llm=llama-tiny", "--rows=2", "--text=12", "--steps=1", "--rounds=1"]
    assert run_command(main, ["schedules", *sizes, f"--schedules={schedule}", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())
    assert capsys.readouterr().out == format_table(rows) + "\n"
    assert [row["what"] for row in rows] == ["no schedule", schedule]
    assert rows[0]["time_share"] == rows[0]["flops_share"] == 1
    model = ModelConfig("clip-tiny", "llama-tiny", FusionConfig("mlp"), "float32", remat="none")
    stages = [make_stage(dataclasses.replace(model, schedule=name), "finetune", 2, 12) for name in (schedule, "")]
    counts = [step_flops(stage.model, stage.rules, 2, stage.data.max_length, 1) for stage in stages]
    assert rows[1]["flops_share"] == counts[0] / counts[1] < 1


def test_step_compares_programs_within_a_round(monkeypatch):
    slowness = iter([1, 1, 3, 3, 2, 2])  # of the machine, in three rounds of each stage

    def measure_process(name, arguments, environment):
        nonlocal slow
        program = arguments[2]
        slow = next(slowness) if program == "ours" else slow
        milliseconds = {"ours": 10, "ours, small pages": 20, "torch": 15, "torch, compiled": 30}[program]
        return {"what": name, "step_ms": milliseconds * slow, "tokens_per_second": 1 / milliseconds / slow, "gib": 2.0}

    slow = 0
    monkeypatch.setattr(step, "measure_process", measure_process)
    monkeypatch.setattr(step, "make_export", lambda *_: None)
    parser = argparse.ArgumentParser()
    arguments.step(parser)
    rows = {row["what"]: row for row in step.run(parser.parse_args(["--llm=llama-tiny", "--vision=clip-tiny"]))}
    assert len(rows) == 8
    ours, small = rows["pretrain, ours"], rows["finetune, ours, small pages"]
    assert (ours["times_torch"], ours["least"], ours["most"], ours["step_ms"], ours["gib"]) == (1.5, 1.5, 1.5, 10, 2.0)
    assert (small["times_torch"], small["step_ms"]) == (0.75, 40)


@pytest.fixture
def fake_vllm(monkeypatch, tmp_path):
    """A server that streams tokens as vLLM does, more slowly for a longer prompt, instead of vLLM's; its requests."""
    requests, waiting = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            waiting.append(None)
            time.sleep(0.05)  # all that are in flight are here
            body["at_once"] = len(waiting)
            time.sleep(0.05)
            waiting.pop()
            self.send_response(200)
            self.end_headers()
            usage = {"prompt_tokens": 640 if "mlp" in body["model"] else 160, "completion_tokens": body["max_tokens"]}
            for event in (*[{"choices": [{}]}] * body["max_tokens"], {"choices": [], "usage": usage}):
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_):
            pass

    @contextlib.contextmanager
    def serve_fake(python, export, dtype, max_length, max_images, options):
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever).start()
            yield server.server_port
            server.shutdown()

    monkeypatch.setattr(serve, "serve", serve_fake)
    monkeypatch.setattr(serve, "_PYTHON", tmp_path)
    return requests


def test_serve_posts_the_same_load_to_each_export(fake_vllm, tmp_path):
    text_config = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    exports = [tmp_path / name for name in ("mlp", "mbtf_stf")]
    for export in exports:
        export.mkdir()
        (export / "config.json").write_text(json.dumps({"text_config": text_config}))
    file = tmp_path / "figures.json"
    options = ["--in-flight=1,4", "--requests=4", "--tokens=3", f"--json={file}"]
    assert run_command(main, ["serve", *map(str, exports), *options]) == 0
    rows = json.loads(file.read_text())
    assert [(row["what"], row["in_flight"]) for row in rows] == [
        ("mlp", 1), ("mlp", 4), ("mbtf_stf", 1), ("mbtf_stf", 4)
    ]  # fmt: skip
    halves = [[body for body in fake_vllm if body["model"].endswith(f"/{name}")] for name in ("mlp", "mbtf_stf")]
    for bodies in halves:
        assert [body["at_once"] for body in bodies] == [1] * 5 + [4] * 4  # a warm-up, then both loads
    first, second = ([json.dumps(body["messages"]) for body in bodies] for bodies in halves)
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 5  # every request of a load has an image of its own
    per_token = 2 * 4 * 2 * 8 * 4  # bytes of keys and values: layers, heads, width of a head, float32
    assert [row["kv_cache_mib"] for row in rows[::2]] == [643 * per_token / 2**20, 163 * per_token / 2**20]
    for slow, fast in zip(rows[:2], rows[2:], strict=True):
        assert fast["times_first"] == pytest.approx(fast["requests_per_second"] / slow["requests_per_second"])


def test_fusion(tmp_path, capsys):
    file, options = (
        tmp_path / "figures.json",
        ["--vision=clip-mini-16-96", "--llm=llama-mini", "--fusions=mlp,mbtf_stf"],
    )
    assert run_command(main, ["fusion", *options, "--batch=2", f"--json={file}"]) == 0
    head, mlp, ours = json.loads(file.read_text())
    assert head["memory"] == "temporaries"
    assert (mlp["what"], mlp["tokens"], ours["what"], ours["tokens"]) == ("mlp", 36, "mbtf_stf", 9)
    for row in (mlp, ours):
        shapes = blueprint(ModelConfig("clip-mini-16-96", "llama-mini", FusionConfig(row["what"]))).shapes
        sizes = [leaf.size for path, leaf in shapes.items() if path.startswith("fusion/")]
        assert row["million_parameters"] == pytest.approx(sum(sizes) / 1e6)
        assert min(row["both_ms"], row["forward_ms"]) > 0
        assert row["both_mib"] > 0
    multiply_adds = 2 * 36 * 128 * 128  # of two layers
    assert mlp["gflop"] == pytest.approx(2 * 2 * multiply_adds / 1e9)
    assert "forward ms" in capsys.readouterr().out


@pytest.fixture
def two_fusions(monkeypatch):
    """Only these have rows, because the traces of each take a second."""
    monkeypatch.setattr(flops.FUSIONS, "known", {"mlp": MLP, "mbtf_stf": MBTFSTF})


@pytest.mark.usefixtures("two_fusions")
def test_flops_agree_with_published_figures(tmp_path):
    file = tmp_path / "figures.json"
    assert run_command(main, ["flops", "--text=64", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())
    by_name = {row["what"]: row for row in rows}
    mlp, ours = by_name["mlp, 64 of text"], by_name["mbtf_stf, 64 of text"]
    for row in (mlp, ours):
        parts = row["tower_gflop"] / 1e3 + row["fusion_gflop"] / 1e3 + row["prefill_tflop"]
        assert row["all_tflop"] == pytest.approx(parts)
    layers, width = 32, 4096
    attention = 2 * layers * width * (640**2 - 208**2)  # two products of T²/2
    matrices = 2 * layers * (4 * width**2 + 3 * width * 11_008) * (640 - 208)
    assert mlp["prefill_tflop"] - ours["prefill_tflop"] == pytest.approx((attention + matrices) / 1e12)
    bound, mini, mini_few = rows[-3:]
    assert bound["decoder_tflop"] < bound["published"] == 1.9
    # One text length explains both of LLaVA-Mini's figures, so they count the FLOPs of the decoder only.
    assert mini["text_decoder"] == mini_few["text_decoder"] == 76
    assert mini["text_all"] != mini_few["text_all"]


@pytest.mark.usefixtures("two_fusions")
def test_flops_of_other_models_are_not_compared(capsys):
    assert run_command(main, ["flops", "--vision=clip-mini-16-96", "--llm=llama-mini", "--text=8"]) == 0
    assert "published" not in capsys.readouterr().out


def test_cost_extrapolates_linearly_to_all_layers(monkeypatch, tmp_path):
    calls = []

    def fake(name, arguments):
        task, folder, fusion, batches = json.loads(arguments[-1])
        layers = llm_preset(folder).layers
        calls.append((task, fusion, layers))
        slope = 30 if fusion == "mlp" else 10
        return {"ms": [100 + slope * layers * b for b in batches], "gib": [layers for _ in batches]}

    monkeypatch.setattr(cost, "measure_process", fake)
    rows = cost.measure("clip-mini-16-96", "llama-mini", [1, 3], [1, 2])
    assert calls == [(t, f, n) for t in cost.TEXT for f in ("mlp", "mbtf_stf") for n in (1, 3)]
    mlp, ours = rows[:2]
    assert (mlp["ms_few"], mlp["ms_more"], mlp["ms_all"]) == (130, 190, 100 + 30 * 4)
    assert (mlp["gib_few"], mlp["gib_more"]) == (1, 3)
    assert ours["times_mlp"] == pytest.approx(220 / 140)
    estimates = [
        {"what": f"{task}, {fusion}, a6000", "rows": 1, "peak_gib": 1.0, "fits": True, "seconds": 1.0, "times_mlp": 1.0}
        for task in cost.TEXT
        for fusion in ("mlp", "mbtf_stf")
    ]
    cost.plot(rows + estimates, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_cost_skips_tasks_that_exceed_the_memory(monkeypatch, capfd):
    def fake(name, arguments):
        if json.loads(arguments[-1])[0] == "finetune":
            return process.measure_process(name, ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
        return {"ms": [100.0], "gib": [1.0]}

    monkeypatch.setattr(cost, "measure_process", fake)
    rows = cost.measure("clip-mini-16-96", "llama-mini", [1, 2], [1])
    assert [row["what"] for row in rows] == [
        f"{task}, {fusion}" for task in cost.TEXT if task != "finetune" for fusion in ("mlp", "mbtf_stf")
    ]
    stderr = capfd.readouterr().err
    assert "finetune, mlp, 1 layers was killed, probably because it ran out of memory. Skipping finetune." in stderr


@pytest.mark.parametrize("task", ["prefill", "pretrain"])
def test_cost_times_the_program_of_a_run(task, tmp_path):
    tower, decoder = vision_preset("clip-tiny"), llm_preset("llama-tiny")
    Description(tower, decoder, FusionConfig("mbtf_stf")).save(tmp_path)
    figures = cost.time_program(task, str(tmp_path), "mbtf_stf", [1])
    assert figures["ms"][0] > 0
    assert figures["gib"][0] > 0


@pytest.mark.slow
def test_cost_estimates_both_fusions_for_a_machine(monkeypatch):
    monkeypatch.setattr(cost, "TEXT", {"pretrain": 64, "prefill": 64})
    rows = cost.estimate("clip-mini-16-384", "llama-mini", [1], topology_devices("a6000:2"))
    assert [row["what"] for row in rows] == [
        f"{task}, {fusion}, a6000" for task in cost.TEXT for fusion in ("mlp", "mbtf_stf")
    ]
    assert all(row["fits"] and row["peak_gib"] > 0 for row in rows)
    assert rows[1]["times_mlp"] == pytest.approx(rows[0]["seconds"] / rows[1]["seconds"])


def test_the_mixture_has_its_documented_statistics():
    assert sum(count for count, *_ in SOURCES.values()) == 665_298
    tokens, images = lengths(20_000, 144, np.random.default_rng(0))
    assert images.mean() == pytest.approx(1 - 40_688 / 665_298, abs=0.01)
    assert tokens[images == 1].min() > 144
    assert tokens.max() == 2048
    sizes = [len(file) for file in jpegs(40, np.random.default_rng(0))]
    assert 100_000 < np.mean(sizes) < 250_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["input", "--json=no/such/folder.json"], "--json=no/such/folder.json: its folder does not exist"),
        (["weights", "--model=llama-7"], "Unknown preset model.llm='llama-7'"),
        (["decode", "--llm=smol"], "Unknown preset model.llm='smol'"),
        (["decode", "--batches=1;8"], "--batches=1;8 must be comma-separated integers"),
        (["decode", "--tokens=1"], "--tokens at least 2"),
        (["fusion", "--fusions=mlp,stff"], "Unknown model.fusion.fusion 'stff'; did you mean 'stf'?"),
        (["fusion", "--batch=0"], "--batch must be at least 1"),
        (["flops", "--text=a"], "--text=a must be comma-separated integers"),
        (["flops", "--text=-1"], "--text must not be negative"),
        (["serve", "no/such/export"], "is not an export: it has no config.json"),
        (["serve", "--in-flight=0"], "--in-flight, --requests and --tokens must be at least 1"),
        (["schedules", "--text=1"], "--text at least 2"),
        (["step", "--rows=0"], "--rows, --steps and --rounds must be at least 1"),
        (["cost", "--layers=2,1"], "--layers=2,1 must be two numbers, the smaller first"),
        (["cost", "--batches=0"], "--batches=0 must be at least 1"),
        (["cost", "--plot=no/such/folder.png"], "--plot=no/such/folder.png: its folder does not exist"),
        (["weights", "--scratch=nowhere"], "--scratch=nowhere is not a folder"),
    ],
)
def test_invalid_arguments_are_rejected_at_once(arguments, sentence, capsys):
    assert run_command(main, arguments) == 2
    assert sentence in capsys.readouterr().err


def test_an_installed_package_has_no_benchmarks(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.delitem(sys.modules, "benchmarks.arguments", raising=False)
    assert run_command(main, ["flops"]) == 2
    assert "run this in a clone of it, or set PYTHONPATH to the clone" in capsys.readouterr().err


def test_idle_compares_runs_with_slow_reading_to_one_without(monkeypatch):
    reading = []

    def train(steps, read_seconds, log_every_steps):
        reading.append(read_seconds)
        return 0.25 if log_every_steps == 1 else 0.2

    monkeypatch.setattr(idle, "_train", train)
    rows = idle.run(argparse.Namespace(share=0.8, steps=20))
    assert reading == [0.0, *[pytest.approx(0.8 * 0.2 / 16)] * 2]  # per row
    assert [row.get("idle") for row in rows] == [None, 0.0, pytest.approx(0.2)]
    assert [row["seconds_per_step"] for row in rows] == [0.2, 0.2, 0.25]


def test_fusions_are_compared_with_the_same_rematerialization():
    """With auto, the smaller model might keep more, and its times and memory would not be comparable."""
    assert {make_task(task, fusion).model.remat for task in TEXT for fusion in ("mlp", "mbtf_stf")} == {"full"}


def test_plans_of_methods_read_the_tokens_that_they_should():
    variants = dict(make_variants("finetune", "vicuna-7b", methods=True))
    assert [*variants] == [
        f"{fusion}{method}"
        for fusion in ("mlp", "mbtf_stf")
        for method in ("", " with pyramiddrop", " with hidrop", " with vica_7b", " with budgets")
    ]
    for name, config in variants.items():
        tokens = 144 if name.startswith("mbtf_stf") and "budgets" not in name else 576
        assert resolve_model(config.model).slots == tokens, name
        assert config.data.max_length == tokens + TEXT["finetune"], name
        assert config.model.schedule == (name.split(" with ")[-1] if "_7b" in name or "drop" in name else ""), name
    assert [*dict(make_variants("prefill", "vicuna-7b", methods=False))] == ["mlp", "mbtf_stf"]
