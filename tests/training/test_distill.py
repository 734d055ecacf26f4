"""Distillation: its loss and gradients, the teacher's rows, what is shared, resuming, meshes, FLOPs and memory."""

import contextlib
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from make_evals import make_model
from tiny import Setup, batches, tiny, train_and_save

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.checkpointing.params import SavedParams
from stf_jax.config import CheckpointConfig, MeshConfig, UserError
from stf_jax.data.packing import Example, to_batch, to_row
from stf_jax.data.sampling import BatchShape
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.blueprint import blueprint
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.planning.program import abstract_train_state
from stf_jax.planning.report import trace_cost
from stf_jax.training.budgets import change_slots
from stf_jax.training.flops import prefill_flops, step_flops
from stf_jax.training.loss import Teaching, chunks_of, cross_entropy_sum, distillation_sum
from stf_jax.training.objectives.base import find_objective
from stf_jax.training.remat import activation_bytes_per_row, bytes_per_device
from stf_jax.training.state import TrainState, base_params, training_blueprint
from stf_jax.training.teacher import check_tokenizer, load_teacher
from stf_jax.weights.folder import find_origin, load_params, open_params

STAGE1 = (("fusion/.*", "train"), (".*", "freeze"))
STAGE2 = (("vision/.*", "freeze"), (".*", "train"))
ALL = ((".*", "train"),)

# ---- The loss --------------------------------------------------------------------------------------------------------


def _case(vocab=600, rows=8, length=5):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.standard_normal((rows, length, 16)), rng.standard_normal((16, vocab))
    taught, head = rng.standard_normal((rows, length, 24)), rng.standard_normal((vocab, 24))
    targets, loss_mask = rng.integers(0, vocab, (rows, length)), rng.random((rows, length)) < 0.6
    floats = (np.float32(x) for x in (hidden, kernel, taught, head))
    return *floats, targets, loss_mask


def _by_torch(teaching, hidden, kernel, taught, head, targets, loss_mask):
    """The loss and its gradients by hidden and kernel, in float64."""
    hidden, kernel = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, kernel))
    taught, head = (torch.tensor(x, dtype=torch.float64) for x in (taught, head))
    mask, t = torch.tensor(loss_mask), teaching.temperature
    logits, others = (hidden @ kernel)[mask], (taught @ head.T)[mask]
    cross_entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(targets)[mask], reduction="sum")
    logs = torch.log_softmax(logits / t, -1), torch.log_softmax(others / t, -1)
    divergence = torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True)
    loss = (1 - teaching.weight) * cross_entropy + teaching.weight * t**2 * divergence
    loss.backward()
    return loss.item(), hidden.grad.numpy(), kernel.grad.numpy()


@pytest.mark.parametrize("teaching", [(1.0, 0.5), (3.0, 1.0), (0.7, 0.3)], ids=str)
@pytest.mark.parametrize(("mesh", "chunk"), [(None, 2**30), (None, 4 * 40 * 256), ((2, 2, 2), 4 * 10 * 256)], ids=str)
def test_loss_and_gradients_equal_torchs(mesh, chunk, teaching):
    teaching, case = Teaching(*teaching, vocab_first=True), _case()
    expected, *gradients = _by_torch(teaching, *case)
    context = contextlib.nullcontext() if mesh is None else compute_context(make_mesh(MeshConfig(*mesh)), "float32")

    def loss(hidden, kernel, taught, head, targets, loss_mask):
        return distillation_sum(hidden, kernel, targets, loss_mask, taught, head, teaching)

    with context, chunks_of(chunk):
        value, found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*case)
        plain = jax.jit(loss)(*case)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert plain == value
    for gradient, reference in zip(found, gradients, strict=False):
        np.testing.assert_allclose(gradient, reference, atol=2e-5)
    assert not found[2].any()  # a teacher does not learn


@chunks_of(4 * 40 * 256)
def test_a_model_that_equals_its_teacher_has_no_divergence():
    """And a weight of 0 is cross-entropy. Logits of up to 600 do not overflow."""
    hidden, kernel, _, _, targets, loss_mask = map(jnp.asarray, _case())

    def loss(hidden, weight):
        taught = hidden if weight else -hidden
        return distillation_sum(hidden, kernel, targets, loss_mask, taught, kernel, Teaching(2.0, weight))

    value, gradient = jax.value_and_grad(loss)(hidden * 40, 1.0)
    assert abs(value) < 1e-2  # of float32 sums of 40² · 16
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    expected, gradient = jax.value_and_grad(cross_entropy_sum)(hidden, kernel, targets, loss_mask)
    found = jax.value_and_grad(loss)(hidden, 0.0)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("optimized")
@chunks_of(2 * 4 * 64 * 128)
def test_no_array_is_as_large_as_all_logits():
    def loss(hidden, kernel, taught, head, targets, loss_mask):
        return distillation_sum(hidden, kernel, targets, loss_mask, taught, head, Teaching(2.0, 0.5, True))

    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*_case(vocab=4096, length=8)).compile().as_text()
    assert "f32[64,128]" in text  # a chunk
    assert "f32[64,4096]" not in text


# ---- The teacher's rows ----------------------------------------------------------------------------------------------


def _conversation(rng):
    """Texts and images (None) in any order, with whether a text is a target."""
    items = [
        None if rng.random() < 0.3 else rng.integers(5, 500, rng.integers(1, 6)) for _ in range(rng.integers(1, 7))
    ]
    return [(item, bool(rng.random() < 0.5)) for item in items]


def _example(items, slots, text):
    """The conversation with ``slots`` per image, up to its first ``text`` tokens of text, by the definition."""
    rows, images = [], 0  # of token, whether it is a target, whether it is an image's
    for item, target in items:
        if item is None:
            rows += [(0, False, True)] * slots
            images += 1
        else:
            rows += [(token, target, False) for token in item[:text]]
            text -= len(item[:text])
    tokens, is_target, is_image = (np.array(column) for column in zip(*rows, strict=True))
    targets, loss_mask = np.append(tokens[1:], 0), np.append(is_target[1:], False)
    image_slots = np.where(is_image, np.cumsum(is_image) - 1, -1)
    return Example(tokens, targets, loss_mask, image_slots, np.zeros((images, 1, 1, 3), np.uint8))


def _batch(rows, length, slots):
    made = [to_row(row, length, 4, 1, slots) for row in rows]
    return to_batch({key: np.stack([row[key] for row in made]) for key in made[0]})


@pytest.mark.parametrize(("slots", "wanted"), [(4, 16), (1, 3), (4, 4), (9, 4)])
def test_answers_are_aligned(slots, wanted):
    """Packed rows, several images, text alone, images side by side or at an end, truncated conversations."""
    rng, students, teachers = np.random.default_rng(slots), [], []
    for _ in range(40):
        row = [(_conversation(rng), int(rng.integers(1, 20)) if rng.random() < 0.3 else 1000) for _ in range(3)]
        while sum(item is None for items, _ in row for item, _ in items) > 4:
            row.pop()
        for rows, count in ((students, slots), (teachers, wanted)):
            rows.append([_example(items, count, cut) for items, cut in row])
    length = max(sum(len(example.tokens) for example in row) for row in students)
    batch, expected = _batch(students, length, slots), _batch(teachers, length + 4 * max(wanted - slots, 0), wanted)
    assert len(set(batch.segment_ids.max(1))) > 2
    assert len(set((batch.image_slots >= 0).sum(1))) > 3
    rows, ends = jax.jit(change_slots, static_argnums=(1, 2, 3))(batch, slots, wanted, expected.tokens.shape[1])
    for key in ("tokens", "targets", "loss_mask", "positions", "segment_ids", "image_slots"):
        np.testing.assert_array_equal(getattr(rows, key), getattr(expected, key), err_msg=key)
    # Where the student predicts a target token, the teacher does.
    for name in ("targets", "loss_mask"):
        found = np.take_along_axis(getattr(expected, name), np.asarray(ends), axis=1)
        np.testing.assert_array_equal(found[batch.loss_mask], getattr(batch, name)[batch.loss_mask], err_msg=name)
    assert batch.loss_mask.sum() == expected.loss_mask.sum() > 100


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder of imported weights: the tiny model with a fusion that keeps all 16 tokens."""
    return str(make_model(tmp_path_factory.mktemp("distill") / "teacher", 5, **{"model.fusion.fusion": "mlp"}))


PACKED = {"data.packing": True, "data.images_per_row": 3, "data.max_length": 160}


def _setup(teacher, rules=STAGE2, mesh=(1, 1, 1), **changes):
    axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    start = {"init_from": teacher, "init_missing": ("fusion/.*",), "rules": rules, "optimizer.warmup_ratio": 0.0}
    objective = {"objective": f"distill:teacher={teacher},temperature=2,weight=0.6", "optimizer.eps": 1e-4}
    return Setup.of(**{**start, **PACKED, **objective, **axes, **changes})


def _start(setup):
    """The state as training starts, with a random fusion."""
    config, own = setup.config, base_params(setup.plan, setup.layout)
    loaded = load_params(config.init_from, own, config.init_missing) | load_teacher(setup.plan, setup.layout.frozen)
    state = setup.state(1)
    trees = ({path: loaded.get(path, x) for path, x in tree.items()} for tree in (state.trainable, state.frozen))
    return dataclasses.replace(state, **dict(zip(("trainable", "frozen"), trees, strict=True)))


@functools.cache
def _data():
    return batches(tiny(**PACKED), 4)


def _copy(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize(
    ("rules", "own"), [(STAGE1, {"fusion"}), (STAGE2, {"fusion", "llm"}), (ALL, {"fusion", "llm", "vision"})]
)
def test_frozen_parts_of_one_origin_exist_once(teacher, rules, own):
    setup = _setup(teacher, rules)
    added = {path for path in setup.plan.added if path.startswith("teacher/")}
    assert {path.split("/")[1] for path in added} == own
    assert added <= setup.layout.frozen.keys()
    # Weights of two folders are not the same, and nor are those that are initialized.
    for changes in (
        {"init_from": "", "init_missing": (".*",)},
        {"init_missing": (".*/norm/scale", "fusion/.*", "v.*")},
    ):
        assert _setup(teacher, rules, **changes).plan.teacher.shared == frozenset()


@functools.cache
def _apart():
    """The logits of a student and of a teacher, which are two models here, at the student's positions."""
    models = [blueprint(tiny(**{"model.fusion.fusion": name}).model) for name in ("mbtf_stf", "mlp")]

    def logits(params, batch):
        wide, ends = change_slots(batch, 4, 16, batch.tokens.shape[1] + 3 * 12)
        student, teacher = (
            plan.merge(tree)(rows.tokens, rows.positions, rows.segment_ids, rows.image_slots, rows.images)
            for plan, tree, rows in zip(models, params, (batch, wide), strict=True)
        )
        return student, jnp.take_along_axis(teacher, ends[:, :, None], axis=1)

    return jax.jit(logits)


@pytest.mark.parametrize("rules", [STAGE1, ALL], ids=["shared", "apart"])
def test_the_loss_is_that_of_two_models(teacher, rules):
    setup, batch, saved = _setup(teacher, rules), _data()[0], SavedParams(epath.Path(teacher))
    state, objective = _start(setup), find_objective(setup.config.objective, setup.config.model)

    def loss(state, batch):
        return objective.loss_sum(setup.plan.merge(state.trainable, state.frozen), batch, packed=True)

    own = {path: np.asarray(x) for path, x in state.params.items() if path not in setup.plan.added}
    outputs = _apart()((own, {path: saved.read(path) for path in saved.shapes}), batch)
    student, other = (np.asarray(x)[batch.loss_mask] for x in outputs)
    eye, targets = np.eye(student.shape[1]), np.int64(batch.targets[batch.loss_mask])
    expected, plain = (
        _by_torch(Teaching(2.0, weight), student, eye, other, eye, targets, np.ones(len(targets), bool))[0]
        for weight in (0.6, 0.0)
    )
    np.testing.assert_allclose(jax.jit(loss)(state, batch), expected, rtol=1e-5)
    assert abs(plain - expected) > 0.01 * expected  # the teacher matters


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """The workdir of a run that saved its second step, and the state and losses of four steps."""
    workdir, setup = epath.Path(tmp_path_factory.mktemp("run")), _setup(teacher)
    return workdir, setup, *train_and_save(workdir, setup, _start(setup), _data())


def test_a_resumed_run_ends_with_the_same_bits(run, tmp_path):
    """What is frozen is lost, too, and is loaded from init_from and the teacher again, with the same fingerprint."""
    workdir, setup, step, expected, losses = run
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    for folder, reload in ((workdir, None), (epath.Path(tmp_path), lambda: _start(setup).frozen)):
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            arrays, _, _ = checkpoints.restore(2, setup.layout, reload)
        state, resumed = TrainState(step=jax.device_put(np.int32(2), setup.layout.step.sharding), **arrays), []
        for batch in _data()[2:]:
            state, metrics = step(state, batch)
            resumed.append(float(metrics["loss"]))
        assert resumed == losses[2:]
        assert jax.tree.map(lambda x: x.tobytes(), _copy(state)) == jax.tree.map(lambda x: x.tobytes(), expected)
    # What is shared stays so if the run's start is gone.
    gone = dataclasses.replace(setup.config, init_from="/gone")
    shared = [training_blueprint(gone, folder).teacher.shared for folder in (workdir, epath.Path(tmp_path), None)]
    assert shared == [{"vision"}, set(), set()]


def test_losses_are_the_same_on_every_mesh_and_with_microbatches(run, teacher):
    setup = _setup(teacher, mesh=(2, 2, 2), **{"optimizer.accumulation_steps": 2})
    state, step, losses = _start(setup), setup.step(), []
    for batch in _data()[:2]:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, run[4][:2], atol=1e-5)


def test_a_run_is_opened_without_its_teacher(run, teacher):
    """So exports, evaluations and later runs see a plain model; its frozen parts lead to their origin."""
    workdir, setup, *_ = run
    plain = blueprint(setup.config.model)
    opened, sums = open_params(workdir), json.loads((workdir / "frozen" / "sums" / "metadata").read_text())
    assert {path: leaf.shape for path, leaf in opened.shapes.items()} == {p: x.shape for p, x in plain.shapes.items()}
    assert {name for name in sums if "/teacher/" in name} == {f"frozen/{p}" for p in setup.plan.added}
    layout = {path: leaf for path, leaf in setup.layout.params.items() if path not in setup.plan.added}
    loaded = load_params(str(workdir), layout, ())
    assert loaded.keys() == plain.shapes.keys()
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        arrays, _, _ = checkpoints.restore(2, setup.layout)
    for path, value in loaded.items():
        np.testing.assert_array_equal(value, (arrays["trainable"] | arrays["frozen"])[path], err_msg=path)
    assert [find_origin(str(workdir), (), part) for part in ("vision", "llm")] == [teacher, str(workdir)]
    assert find_origin(f"{workdir},{teacher}", (), "llm") == teacher
    assert find_origin(teacher, ("llm/norm/.*",), "llm") == find_origin("miniatures/none", (), "llm") == ""


# ---- What it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [STAGE1, ALL], ids=["shared", "apart"])
def test_the_teacher_is_in_the_flops_and_the_memory(teacher, rules):
    setup, model = _setup(teacher, rules), tiny(**{"model.fusion.fusion": "mlp"}).model
    config = setup.config
    plain = dataclasses.replace(config, objective="")
    counts = [step_flops(each.model, rules, 8, 160, 3, each.objective, each.init_from) for each in (config, plain)]
    forward = prefill_flops(model, 8, 160 + 3 * 12, 3)
    forward["head"] *= 160  # at the student's positions
    shared = {"vision", "llm"} if rules == STAGE1 else set()  # the states of a shared tower are the student's
    assert counts[0] - counts[1] == sum(flops for part, flops in forward.items() if part not in shared & {"vision"})
    devices = jax.devices()[:1]
    layouts = [abstract_train_state(each, devices) for each in (config, plain)]
    own = {path: leaf for path, leaf in blueprint(model).shapes.items() if path.split("/")[0] not in shared}
    memory = [bytes_per_device(layout) for layout in layouts]
    assert memory[0] - memory[1] == sum(4 * leaf.size for leaf in own.values())
    if shared:  # nothing of the teacher is kept for the backward pass
        cost = trace_cost(config, "train", devices)
        assert cost.flops_per_row > counts[0] / 8
        kept = activation_bytes_per_row(
            plain, make_mesh(MeshConfig(1, 1, 1), devices), layouts[1], BatchShape(8, 160, 3)
        )
        assert cost.activation_bytes_per_row == kept


# ---- Wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "name the teacher, teacher=FOLDER"),
        (":teacher={teacher},temperature=0", "temperature must be above 0"),
        (":teacher={teacher},temperature=nan", "temperature=nan must be a number"),
        (":teacher={teacher},weight=1.5", "weight must be at least 0, and at most 1"),
        (":teacher={teacher},weights=1", "unknown option 'weights'; did you mean 'weight'?"),
        (":teacher=/none", "/none is neither the workdir of a run nor a folder of imported weights"),
    ],
)
def test_wrong_options_are_explained(teacher, options, message):
    with pytest.raises(UserError) as raised:
        find_objective(f"distill{options.format(teacher=teacher)}", tiny().model)
    assert message in str(raised.value)
    assert str(raised.value).count(".") <= str(teacher).count(".") + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision": {"image_size": 96}},
            "has images of 96 pixels a side, but the model has images of 64 pixels a side",
        ),
        ({"llm": {"vocab": 1024}}, "has a vocabulary of 1,024 tokens, but the model has a vocabulary of 512 tokens"),
        ({"llm": None}, "is not a complete model"),
    ],
)
def test_a_teacher_that_does_not_suit_is_rejected(teacher, tmp_path, change, message):
    """From its description, before its weights are read."""
    shutil.copytree(teacher, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "model.json").read_text())
    values |= {part: changed and values[part] | changed for part, changed in change.items()}
    (tmp_path / "model.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        _setup(teacher, objective=f"distill:teacher={tmp_path}")


def test_a_teacher_with_another_tokenizer_is_rejected(teacher, tmp_path):
    setup = _setup(teacher)
    check_tokenizer(setup.plan, load_tokenizer("miniature"))
    with pytest.raises(UserError, match="has another tokenizer; teacher and model need the same tokens"):
        check_tokenizer(setup.plan, load_tokenizer("miniature/2"))
