"""The plan command on miniatures; slow tests plan the documented full-size recipes."""

import collections
import copy
import dataclasses
import itertools
import json
import math
import os

import jax
import numpy as np
import pytest
from tiny import load_recipe, tiny

from stf_jax import plan
from stf_jax.cli import run_command
from stf_jax.data.pipeline import Batches, Preprocessor, load_training_records
from stf_jax.data.sampling import BatchShape, Plan
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import resolve_model
from stf_jax.planning import report as report_module
from stf_jax.planning import search as search_module
from stf_jax.planning.batches import count_batches, count_steps
from stf_jax.planning.program import OutOfMemory, Program, make_program
from stf_jax.planning.topology import topology_devices
from stf_jax.training.flops import decode_flops, prefill_flops, step_flops
from stf_jax.training.optimizer import make_optimizer
from stf_jax.training.state import state_layout

pytestmark = pytest.mark.usefixtures("optimized")

BFLOAT16 = ["--config.model.precision=bfloat16", "--config.model.scan_layers=True"]
SHAPE = ["--config.model.llm=llama-mini", "--config.data.max_length=208", "--config.data.images_per_row=1"]
DEMO = ["--config=configs/demo.py:stage=finetune", "--config.model.remat=full", *SHAPE, *BFLOAT16]
TINY = ["--config=tests/tiny.py", "--config.mesh.data=1", "--config.mesh.fsdp=-1", *BFLOAT16]
KEYS = {
    "topology", "slices", "what", "chip", "devices", "mesh", "rows", "positions", "images", "remat", "fits",
    "peak_bytes_per_device", "memory_limit_bytes_per_device", "memory", "model_flops", "executed_flops",
    "memory_traffic_bytes", "collective_bytes", "roofline_seconds", "bound", "step_seconds_estimate",
    "tokens_per_second", "mfu_estimate", "steps", "hours", "of_the_data",
}  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    """Reports of the programs that were compiled; see ``shared_programs``."""
    return {}


@pytest.fixture(autouse=True)
def shared_programs(reports, monkeypatch):
    """Compiles a program for the first test that needs it, in up to 20 s of a core; the others get the same report."""
    report_program = report_module._report_program

    def report_once(config, program, devices):
        limit = report_module.memory_limit(devices[0])
        key = str((config, program.kind, devices[0].device_kind, program.mesh, limit))
        if key not in reports:
            reports[key] = report_program(config, program, devices)
        return copy.deepcopy(reports[key])  # the caller changes it

    monkeypatch.setattr(report_module, "_report_program", report_once)


def run_plan(capsys, *argv):
    assert run_command(plan.main, [*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def analytic(config, devices):
    """Bytes per device of parameters and of moments, from sizes only; fsdp shards everything except norms."""
    trainable = frozen = moments = 0
    for path, leaf in blueprint(config.model).shapes.items():
        replicated = path.rsplit("/", 1)[-1] == "scale" or "norm" in path or path == "vision/class_token"
        size = math.prod(leaf.shape) // (1 if replicated else devices)
        if path.startswith("vision/"):
            frozen += 2 * size
        else:
            trainable, moments = trainable + 4 * size, moments + 8 * size
    return trainable + frozen, moments


@pytest.mark.parametrize("topology", ["h100:8", "v5e:2x4"])
def test_a_training_step_for_a_topology(topology, capsys):
    found = run_plan(capsys, *DEMO, f"--topology={topology}", "--price-per-chip-hour=3")
    assert found.keys() == KEYS | {"chip_hours", "cost"}
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert (found["fits"], found["devices"], found["rows"], found["positions"]) == (True, 8, 8, 208)
    memory, config = found["memory"], load_recipe("demo.py:stage=finetune", *DEMO[1:])
    assert memory.keys() == {"parameters", "optimizer", "batch", "activations", "temporaries"}
    layout = state_layout(
        config, blueprint(config.model), make_optimizer(config.optimizer, 9), _topology_mesh(topology)
    )
    for part, tree in {"parameters": layout.params, "optimizer": layout.moments}.items():
        size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        assert memory[part] == size
    assert found["model_flops"] == step_flops(config.model, config.rules, 8, 208, 1)
    assert 1 < found["executed_flops"] / found["model_flops"] < 1.5
    # A fully sharded step gathers the weights of the decoder at least twice and scatters their gradients.
    sent = sum(by_axis.get("fsdp", 0) for by_axis in found["collective_bytes"].values())
    decoder = 2 * sum(math.prod(x.shape) for path, x in blueprint(config.model).shapes.items() if "llm/blocks" in path)
    assert sent > 3 * decoder * 7 / 8
    assert (found["steps"], found["of_the_data"]) == (300, False)  # packed rows are equally long
    assert found["hours"] == pytest.approx(300 * found["step_seconds_estimate"] / 3600)
    assert found["cost"] == pytest.approx(3 * 8 * found["hours"])
    seconds = report_module._step_seconds(config, BatchShape(8, 208, 1), found, topology_devices(topology))
    assert seconds == pytest.approx(found["step_seconds_estimate"])


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0, "epochs": 1.3, "data.tokens_per_batch": 1536},
        {"steps": 0, "epochs": 2.0, "data.packing": True},
    ],
    ids=str,
)
def test_hours_are_those_of_the_batches_of_the_run(changes, monkeypatch):
    config = tiny(**{"data.buckets": 3, "global_batch_size": 4, "mesh.data": 1} | changes)
    model, tokenizer = resolve_model(config.model), load_tokenizer(config.data.tokenizer)
    prepare = Preprocessor(config.data, tokenizer, model.vision_shape, model.slots)
    stream = Batches(config, load_training_records(config), prepare, host=0, hosts=1)
    steps = config.steps or stream.plan.steps(config.epochs)
    trained = collections.Counter(
        BatchShape(*batch.tokens.shape, batch.images.shape[1]) for batch in itertools.islice(stream, steps)
    )
    stream.close()
    assert count_batches(config) == trained
    assert config.data.packing or len(trained) > 1
    if config.data.packing:
        return
    # Every step sends the same; what takes longest counts.
    device, seconds = topology_devices("h100:8")[:1], dict[tuple[int, int, int], float]()

    def step_seconds(config, shape, report, device):
        return seconds.setdefault(shape, original(config, shape, report, device))

    original = report_module._step_seconds
    monkeypatch.setattr(report_module, "_step_seconds", step_seconds)
    report = {"remat": "none", "roofline_seconds": {"link": 0.0, "network": 0.0}}
    found = report_module._run_cost(config, "train", report, device, price=2.0)
    assert seconds.keys() == trained.keys()
    assert len(set(seconds.values())) > 1
    hours = pytest.approx(sum(count * seconds[shape] for shape, count in trained.items()) / 3600)
    assert found == {
        "steps": steps,
        "hours": hours,
        "of_the_data": True,
        "chip_hours": hours,
        "cost": pytest.approx(2 * found["hours"]),
    }
    report = {"remat": "none", "roofline_seconds": {"link": 1.0, "network": 0.0}}
    assert original(config, max(trained), report, device) == pytest.approx(1 / 0.8)


@pytest.mark.parametrize("epochs", [0.07, 0.5, 1.0, 1.3, 3.0])
@pytest.mark.parametrize("records", [5, 16, 801])
def test_steps_are_counted_as_training_counts_them(epochs, records):
    overrides = [f"--config.epochs={epochs}", f"--config.data.records={records}", "--config.global_batch_size=16"]
    config = load_recipe("finetune.py", *overrides)
    lengths = np.full(records, 9)
    trained = Plan(config.data, 0, 16, lengths, np.ones(records, int), [records])
    assert count_steps(config) == trained.steps(epochs)


def test_the_steps_of_a_data_source_of_your_own_are_counted(monkeypatch):
    monkeypatch.syspath_prepend("tests/plugins")
    config = tiny(**{"data.source": "squares:open_squares", "steps": 0, "epochs": 2.0})
    assert count_steps(config) == 2 * 1000 / 8


def _topology_mesh(topology):
    return make_program(load_recipe("demo.py:stage=finetune"), "train", topology_devices(topology)).mesh


def test_text_output(capsys):
    assert run_command(plan.main, [*DEMO, "--topology=h100:8", "--price-per-chip-hour=3"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("train on h100:8: fits. Peak memory per device: 0.0")
    for words in ("mesh data 1, fsdp 8, tensor 1", "recomputed", "all-gather over fsdp", "300 steps", "chip hours"):
        assert words in output


@pytest.mark.parametrize("what", ["prefill", "decode", "evaluate"])
def test_inference_programs(what, capsys):
    found = run_plan(capsys, *DEMO, "--config.eval.batch=14", "--topology=h100:8", f"--what={what}")
    assert found["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2}  # the decoder has two kv heads
    assert found["rows"] == 16  # rounded up to a multiple of four
    assert (found["steps"], found["hours"]) == (None, None)
    config = load_recipe("demo.py:stage=finetune", *DEMO[1:])
    prefill = sum(prefill_flops(config.model, 16, 208, 1).values())
    decode = decode_flops(config.model, 16, 208 + 128)
    assert found["model_flops"] == {"prefill": prefill, "decode": decode, "evaluate": prefill + 128 * decode}[what]
    assert found["tokens_per_second"] * found["step_seconds_estimate"] == pytest.approx(
        16 * {"prefill": 208, "decode": 1, "evaluate": 128}[what]
    )
    if what == "evaluate":  # the demo evaluates during training
        assert found["during_training"] is True
        assert found["peak_bytes_per_device"] > found["memory"]["training state"] > 0
    if what == "decode":  # keys and values of four layers: four rows per device, one head of 32, 208 + 128 slots
        assert found["memory"]["cache"] == 2 * 4 * (4 * 1 * 336 * 32) * 2
        assert "fsdp" not in str(found["collective_bytes"])  # no weights are gathered


def test_evaluation_during_training_includes_the_training_state():
    config = load_recipe("demo.py:stage=finetune", "--config.mesh.data=1", "--config.mesh.fsdp=1", *BFLOAT16)
    size = sum(analytic(config, 1)) + 12  # plus three step counters
    report = {"fits": True, "peak_bytes_per_device": 10**6, "memory": {"cache": 5}}
    for spare, fits in ((0, True), (-1, False)):
        limit = {"memory_limit_bytes_per_device": 10**6 + size + spare}
        found = report_module._add_train_state(config, report | limit, jax.devices()[:1])
        assert found["memory"] == {"training state": size, "cache": 5}
        assert (found["peak_bytes_per_device"], found["fits"]) == (10**6 + size, fits)
    separate = dataclasses.replace(config, eval=dataclasses.replace(config.eval, benchmarks=()))
    assert report_module._add_train_state(separate, report, jax.devices()) == {"during_training": False}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--config=configs/demo.py:stage=finetune"], "--topology is missing"),
        (["--config=configs/demo.py", "--topology=h100:8"], "has stages pretrain, finetune; select one"),
        ([*DEMO, "--topology=h100:8", "--what=train", "--slices=0"], "--slices must be at least 1"),
        ([*DEMO, "--topology=h100:8", "--price-per-chip-hour=-1"], "finite and at least 0"),
        ([*DEMO, "--topology=h100:8", "--price-per-chip-hour=nan"], "finite and at least 0"),
        ([*DEMO, "--topology=h100:8", "--search", "--what=decode"], "--search requires --what=train"),
        ([*DEMO, "--topology=h100:8", "--what=dream"], "invalid choice"),
        ([*DEMO, "--topology=h100:7"], "global_batch_size=8 is not a multiple of 7"),
        ([*DEMO, "--topology=h100:8", "--config.global_batch_size=12"], "global_batch_size=12 is not a multiple of 8"),
        (["--topology=h100:8"], "--config is missing"),
    ],
)
def test_invalid_input_is_rejected(argv, sentence, capsys):
    assert run_command(plan.main, argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("error:") == 1


@pytest.fixture
def small_search(monkeypatch):
    """Limits the search to seconds."""
    for name, value in {"_TENSOR": (1,), "_MICROBATCHES": (1, 4), "SETTINGS": ("none", "full"), "COMPILES": 1}.items():
        monkeypatch.setattr(search_module, name, value)


@pytest.mark.usefixtures("small_search")
@pytest.mark.slow  # a minute
def test_a_search_finds_settings_that_fit(monkeypatch, capsys):
    def set_memory_limit(limit):
        for module in (report_module, search_module):
            monkeypatch.setattr(module, "memory_limit", lambda device: limit)

    argv = [*TINY, "--config.model.remat=none", "--config.global_batch_size=512", "--topology=v5e:2x4"]
    set_memory_limit(2**20)
    found = run_plan(capsys, *argv)
    needed = found["peak_bytes_per_device"]
    assert (found["fits"], needed > 2**20) == (False, True)
    set_memory_limit(needed // 2)
    found = run_plan(capsys, *argv, "--search")
    best, *_ = found["ranked"]
    assert best["fits"]
    assert best["peak_bytes_per_device"] <= needed // 2
    assert best["settings"]["model.remat"] != "none" or best["settings"]["optimizer.accumulation_steps"] > 1
    seconds = [trial["step_seconds_estimate"] for trial in found["ranked"]]
    assert seconds == sorted(seconds)
    assert 1 <= found["compiled"] <= 2 < found["tried"]


def test_what_is_wrong_with_all_candidates_ends_a_search(capsys):
    assert run_command(plan.main, [*TINY, "--topology=h100:8", "--search", "--config.global_batch_size=6"]) == 2
    assert "global_batch_size=6 is not a multiple of 8" in capsys.readouterr().err


def test_a_search_prefers_what_copies_nothing_to_the_host():
    full, offload = (
        search_module._Candidate(tiny(**{"model.remat": remat}), 1.0, size)
        for remat, size in (("full", 9), ("offload", 1))
    )
    faster = search_module._Candidate(full.config, 0.9, 99)
    assert sorted([offload, full, faster], key=search_module._Candidate.order) == [faster, full, offload]


def test_batches_of_tokens_do_not_limit_the_trace():
    config = tiny(**{"global_batch_size": 8, "data.tokens_per_batch": 8 * 192, "mesh.data": 1})
    devices, plain = topology_devices("h100:8"), tiny(**{"global_batch_size": 8, "mesh.data": 1})
    assert report_module.trace_cost(config, "train", devices) == report_module.trace_cost(plain, "train", devices)


@pytest.mark.usefixtures("small_search")
def test_a_search_may_find_nothing(monkeypatch, capsys):
    for module in (report_module, search_module):
        monkeypatch.setattr(module, "memory_limit", lambda device: 1000)
    assert run_command(plan.main, [*TINY, "--topology=h100:8", "--search"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("None of the ")
    assert output.endswith("fits h100:8; 0 were compiled.\n")


def test_the_compiler_reports_the_memory_that_a_program_needs():
    """libtpu rejects programs that exceed the memory of a chip and reports the bytes needed."""
    before = dict(os.environ)
    (device,) = topology_devices("v5e:1x1")
    assert os.environ == before  # the variables that libtpu reads on load are removed
    mesh = jax.sharding.Mesh([[[device]]], ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((2**17, 2**17), "float32", sharding=replicated)  # 64 GiB
    call = jax.jit(lambda x: x @ x, out_shardings=replicated)
    with pytest.raises(OutOfMemory) as caught:
        Program("train", 1, 1, 0, mesh, "bfloat16", call, (x,), {}).compile()
    assert caught.value.needed == 128 * 2**30


@pytest.mark.slow  # minutes each
@pytest.mark.parametrize("llm", ["vicuna-7b", "vicuna-13b"])
@pytest.mark.parametrize("file", ["pretrain", "finetune"])
@pytest.mark.parametrize("topology", ["v5e:4x8", "v5p:2x2x4", "a6000:8", "h200:8", "v5e:8x8"])
def test_the_recipe_at_full_size(topology, file, llm, capsys):
    found = run_plan(capsys, f"--config=configs/{file}.py:llm={llm}", f"--topology={topology}")
    config = load_recipe(f"{file}.py:llm={llm}")
    if file == "finetune":
        parameters, moments = analytic(config, found["devices"])
        assert found["memory"]["parameters"] == pytest.approx(parameters, rel=1e-4)
        assert found["memory"]["optimizer"] == pytest.approx(moments, rel=1e-4)
        # 7B fits the paper's machine, 13B fits 64 small chips.
        assert found["fits"] == ((topology, llm) != ("a6000:8", "vicuna-13b"))
    assert 1 < found["executed_flops"] / found["model_flops"] < 1.5
    assert 0.3 < found["mfu_estimate"] < 0.7
