"""Schedules against a second implementation, one conversation at a time, in torch: loss, gradients, answers, FLOPs."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_module
import torch
from etils import epath
from make_evals import make_model
from tiny import batches, large_params, spec, tiny

from stf_jax import convert, main
from stf_jax.cli import run_command
from stf_jax.config import FusionConfig, MeshConfig, UserError
from stf_jax.data.packing import Example, to_batch, to_row
from stf_jax.inference import decoding
from stf_jax.inference.decoding import Sampling
from stf_jax.models.blueprint import blueprint
from stf_jax.models.schedules import vica
from stf_jax.models.schedules.base import SCHEDULES, Schedule, plan_schedule
from stf_jax.models.spec import resolve_model
from stf_jax.models.vlm import VLM
from stf_jax.parallel.mesh import BATCH, compute_context, make_mesh
from stf_jax.training.flops import decode_flops, step_flops
from stf_jax.training.objectives.next_token import NextToken
from stf_jax.training.teacher import find_teacher
from stf_jax.weights.model import open_model

LLM = spec.LLM["llama-deeper-tiny"] = dataclasses.replace(spec.LLM["llama-deep-tiny"], layers=5)
N, IMAGES, SIDE = 16, 2, 64
SILENT = Schedule(functools.partial(vica._plan, (0, 3)), silent_prefix=True)  # as vica_7b, whose decoder is deeper
NAMES = {
    "vica": "silent",
    "pyramiddrop": "pyramiddrop:after=1+3,keep=7+2",
    "hidrop": "hidrop:enter=1,layers=2,keep=5,exit=4,soft=0.5",
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SCHEDULES.known, "silent", SILENT)


def model_config(method, **changes):
    changed = {"llm": "llama-deeper-tiny", "fusion.fusion": "mlp", "schedule": NAMES[method], **changes}
    return resolve_model(tiny(**{f"model.{key}": value for key, value in changed.items()}).model)


# ---- The second implementation ---------------------------------------------------------------------------------------


class Reference:
    """The methods in float64, for a conversation whose positions are all in memory, or a list of those that are left.

    ``asks(left)`` gives the indices in ``left`` whose attention ranks.
    """

    def __init__(self, params):
        self.p = {
            path.removeprefix("llm/"): torch.tensor(np.float64(x), requires_grad=True)
            for path, x in params.items()
            if path.startswith("llm/")
        }

    def norm(self, x, name, *layer):
        scale = self.p[f"{name}/scale"][layer] if layer else self.p[f"{name}/scale"]
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + LLM.norm_eps) * scale

    def heads(self, name, i, y, positions):
        p = f"blocks/attention/{name}"
        x = torch.einsum("td,dhe->the", y, self.p[f"{p}/kernel"][i]) + self.p[f"{p}/bias"][i]
        if name == "value":
            return x.repeat_interleave(LLM.heads // LLM.kv_heads, 1)
        half = LLM.head_dim // 2
        angles = torch.tensor(positions)[:, None, None] * LLM.rope_theta ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        x = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
        return x if name == "query" else x.repeat_interleave(LLM.heads // LLM.kv_heads, 1)

    def weights(self, i, x, positions, mask):
        y = self.norm(x, "blocks/attention_norm", i)
        q, k = (self.heads(name, i, y, positions) for name in ("query", "key"))
        scores = torch.einsum("the,she->hts", q, k) / LLM.head_dim**0.5
        return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1), self.heads("value", i, y, positions)

    def layer(self, i, x, positions, mask, silent=()):
        weights, v = self.weights(i, x, positions, mask)
        out = torch.einsum("hts,she->the", weights, v)
        out[list(silent)] = 0
        x = x + torch.einsum("the,hed->td", out, self.p["blocks/attention/out/kernel"][i])
        y = self.norm(x, "blocks/mlp_norm", i)
        gate = torch.nn.functional.silu(y @ self.p["blocks/mlp/gate/kernel"][i])
        return x + (gate * (y @ self.p["blocks/mlp/up/kernel"][i])) @ self.p["blocks/mlp/down/kernel"][i]

    def best(self, i, x, positions, left, image, asks, keep):
        """The image tokens to keep, best first, by what the positions that ask would give in this layer."""
        with torch.no_grad():
            weights, _ = self.weights(i, x, positions, torch.tril(torch.ones(len(x), len(x), dtype=bool)))
            scores = weights.mean(0)[asks(left)].mean(0)
        candidates = sorted((j for j in range(len(left)) if image[left[j]]), key=lambda j: -scores[j])
        keep *= int(image.sum()) // N
        if 0 < keep < len(candidates):
            gap = scores[candidates[keep - 1]] - scores[candidates[keep]]
            assert gap > 1e-6, "scores too close: rounding decides"
        return candidates[:keep]

    def read(self, method, x, image, asks):
        """States after the final norm, and the positions that are left."""
        left = getattr(self, method)(x, image, asks)
        return self.norm(left[0], "norm"), left[1]

    def vica(self, x, image, asks):
        """By masks, over all positions: image tokens are reset after each layer."""
        length, start = len(x), x
        causal, text = torch.tril(torch.ones(length, length, dtype=bool)), torch.tensor(~image)
        silent = range(int(image.argmax()))  # text before the first image; none if there is no image
        for i in range(LLM.layers):
            mask = causal if i in (0, 3) else causal & (text | torch.eye(length, dtype=bool))
            x = torch.where(text[:, None], self.layer(i, x, range(length), mask, silent), start)
        return x[text], np.flatnonzero(~image).tolist()

    def pyramiddrop(self, x, image, asks):
        left = list(range(len(x)))
        for i in range(LLM.layers):
            if keep := {1: 7, 3: 2}.get(i):
                kept = self.best(i, x, range(len(left)), left, image, asks, keep)
                rows = [j for j in range(len(left)) if j in kept or not image[left[j]]]
                left, x = [left[j] for j in rows], x[rows]
            x = self.layer(i, x, range(len(left)), torch.tril(torch.ones(len(x), len(x), dtype=bool)))
        return x, left

    def hidrop(self, x, image, asks):
        start, left = x, np.flatnonzero(~image).tolist()
        x = x[left]
        for i in range(LLM.layers):
            if i == 1:
                joined = start.clone()
                joined[left] = x
                left, x = list(range(len(start))), joined
            if i == 2:
                kept = self.best(i, x, left, left, image, asks, 5)
                y = torch.ones(len(x), 1, dtype=torch.float64)
                for rank, j in enumerate(kept):
                    y[j] = 1 / (1 + np.exp(-0.5 * (len(kept) - rank)))
                rows = [j for j in range(len(left)) if j in kept or not image[left[j]]]
                left, x = [left[j] for j in rows], (x * y)[rows]
            if i == 4:
                rows = [j for j in range(len(left)) if not image[left[j]]]
                left, x = [left[j] for j in rows], x[rows]
            x = self.layer(i, x, left, torch.tril(torch.ones(len(x), len(x), dtype=bool)))
        return x, left


# ---- Training --------------------------------------------------------------------------------------------------------

LENGTH = 76


@functools.cache
def conversations():
    """Five conversations: token ids, which are image tokens and targets, and the first of their image tokens' rows."""
    rng, found = np.random.default_rng(3), []
    # Images and texts in turn, a target text in parentheses; two turns, one, two images, none, and a target at once.
    for parts in ([4, N, 3, (4,), 2, (3,)], [3, N, 2, (5,)], [2, N, 3, N, 4, (3,), 1, (2,)], [6, (7,)], [1, N, (9,)]):
        marks = np.concatenate([np.full(*((p[0], 2) if isinstance(p, tuple) else (p, p == N))) for p in parts])
        found.append((rng.integers(3, 500, len(marks), np.int32), marks == 1, marks == 2))
    return found, rng.standard_normal((5, IMAGES * N, LLM.width), np.float32)


def make_batch(rows):
    """The conversations with these numbers as rows, with their image tokens [B, M·N, D]."""
    found, image_tokens = conversations()
    made, tokens = [], np.zeros((len(rows), IMAGES * N, LLM.width), np.float32)
    for row, members in enumerate(rows):
        examples, used = [], 0
        for member in members:
            ids, image, target = found[member]
            count = image.sum()
            tokens[row, used : used + count] = image_tokens[member, :count]
            used += count
            images = np.zeros((count // N, SIDE, SIDE, 3), np.uint8)
            slots = np.where(image, np.cumsum(image) - 1, -1)
            examples.append(Example(ids, np.append(ids[1:], 0), np.append(target[1:], False), slots, images))
        made.append(to_row(examples, LENGTH, IMAGES, SIDE, N))
    return to_batch({key: np.stack([row[key] for row in made]) for key in made[0]}), tokens


PACKED = [[0, 1], [2], [3, 4]]
# The test on a mesh compares its loss too.
SLOW_PYRAMIDDROP = pytest.param("pyramiddrop", marks=pytest.mark.slow)


@functools.cache
def make_params():
    return large_params(blueprint(model_config("vica")).shapes, 2)


def loss_sum(config, packed, params, image_tokens, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLM, "image_tokens", lambda *_, **__: image_tokens)
        return NextToken().loss_sum(blueprint(config).merge(params), batch, packed)


def answer_starts(target, left):
    return [j for j in range(len(left) - 1) if target[left[j + 1]] and not target[left[j]]]


@functools.cache
def expected(method):
    """The loss of each conversation, and the gradients of their sum by path and of all image tokens."""
    reference, (found, image_tokens), losses = Reference(make_params()), conversations(), []
    image_tokens = torch.tensor(np.float64(image_tokens), requires_grad=True)
    for (ids, image, target), tokens in zip(found, image_tokens, strict=True):
        x = reference.p["embedding"][ids].clone()
        x[image] = tokens[: image.sum()]
        x, left = reference.read(method, x, image, functools.partial(answer_starts, target))
        logits = x @ reference.p["embedding"].T
        learned = [(j, ids[after]) for j, after in enumerate(left[1:]) if target[after]]
        assert len(learned) == target.sum()
        losses.append(sum(torch.logsumexp(logits[j], -1) - logits[j, token] for j, token in learned))
    sum(losses).backward()
    gradients = {f"llm/{path}": p.grad.numpy() for path, p in reference.p.items()}
    return [loss.item() for loss in losses], gradients, image_tokens.grad.numpy()


@pytest.mark.parametrize("method", ["vica", SLOW_PYRAMIDDROP, "hidrop"])
def test_loss_and_gradients_of_packed_rows_equal_those_of_each_conversation(method):
    (batch, tokens), params = make_batch(PACKED), make_params()
    differentiate = jax.jit(jax.value_and_grad(functools.partial(loss_sum, model_config(method), True), (0, 1)))
    loss, (gradients, of_tokens) = differentiate(params, tokens, batch)
    losses, wanted, wanted_of_tokens = expected(method)
    np.testing.assert_allclose(loss, sum(losses), rtol=1e-5)
    for path, value in wanted.items():
        np.testing.assert_allclose(gradients[path], value, atol=3e-5 * np.abs(value).max(), err_msg=path)
    for row, members in enumerate(PACKED):
        counts = [conversations()[0][member][1].sum() for member in members]
        value = np.concatenate([wanted_of_tokens[m, :n] for m, n in zip(members, counts, strict=True)])
        np.testing.assert_allclose(of_tokens[row, : len(value)], value, atol=3e-5 * np.abs(wanted_of_tokens).max())


# ---- Answers ---------------------------------------------------------------------------------------------------------

NEW_TOKENS = 4


@functools.cache
def prompts():
    """Tokens, slots and lengths of prompts without, with one and with two images, and the images' tokens."""
    rng, layouts = np.random.default_rng(5), [(9,), (3, 6), (2, 4, 3)]  # text before, between and after images
    tokens, slots = np.zeros((3, 48), np.int32), np.full((3, 48), -1, np.int32)
    for row, (before, *texts) in enumerate(layouts):
        marks = [-1] * before
        for image, count in enumerate(texts):
            marks += [*range(image * N, image * N + N), *[-1] * count]
        slots[row, : len(marks)], tokens[row, : len(marks)] = marks, rng.integers(3, 500, len(marks))
    lengths = np.array([sum(parts) + N * (len(parts) - 1) for parts in layouts], np.int32)
    return tokens, slots, lengths, rng.standard_normal((3, IMAGES * N, LLM.width), np.float32)


@pytest.mark.parametrize("method", ["vica", SLOW_PYRAMIDDROP, pytest.param("hidrop", marks=pytest.mark.slow)])
def test_answers_with_caches_equal_those_of_reading_all_again(method, monkeypatch):
    tokens, slots, lengths, image_tokens = prompts()
    monkeypatch.setattr(VLM, "image_tokens", lambda *_, **__: jnp.asarray(image_tokens))
    config, params = model_config(method), make_params()
    plan, mesh = blueprint(config), make_mesh(MeshConfig(1, 1, 1))
    weights = {
        path: tuple(map(jnp.asarray, x)) if path.startswith(decoding.BLOCKS) else jnp.asarray(x)
        for path, x in params.items()
    }
    # A row needs room for what others drop of their images.
    padding = ((0, 0), (0, IMAGES * config.reduction.dropped))
    tokens, slots = np.pad(tokens, padding), np.pad(slots, padding, constant_values=-1)
    prefill, extend, _ = decoding.make_programs(decoding.TokenRules((2,), (2,)), plan, mesh)
    images = np.zeros((3, IMAGES, SIDE, SIDE, 3), np.uint8)
    with compute_context(mesh, "float32"):
        state = prefill(NEW_TOKENS, weights, tokens, slots, lengths, images, Sampling())
        state = extend(weights, state, NEW_TOKENS, Sampling())
    sizes = [keys.shape[2] - NEW_TOKENS - tokens.shape[1] + IMAGES * N for keys, _ in state.cache]
    assert [size // IMAGES for size in sizes] == {
        "vica": [N, 0, 0, N, 0],
        "pyramiddrop": [N, 7, 7, 2, 2],
        "hidrop": [0, N, 5, 5, 0],
    }[method]
    reference = Reference(params)
    for row, length in enumerate(lengths):
        answer = []
        for found in np.asarray(state.output_ids[row]):
            ids = np.concatenate([tokens[row, :length], answer]).astype(int)
            image = np.append(slots[row, :length] >= 0, np.zeros(len(answer), bool))
            x = reference.p["embedding"][ids].clone()
            x[image] = torch.tensor(np.float64(image_tokens[row, : image.sum()]))
            x, _ = reference.read(method, x, image, lambda left, length=length: [left.index(length - 1)])
            logits = (reference.p["embedding"] @ x[-1]).detach().numpy()
            logits[2] = -np.inf
            best = np.sort(logits)[-2:]
            assert best[1] - best[0] > 1e-3, "logits too close: rounding decides"
            assert found == logits.argmax()
            answer.append(found)


# ---- Meshes, FLOPs and configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "packed"), [(MeshConfig(1, 1, 1), False), (MeshConfig(2, 2, 2), True)], ids=str)
def test_loss_is_the_same_on_a_mesh_and_of_rows_that_are_not_packed(shape, packed):
    members = [[0], [1], [2], [3], [4], *(PACKED if packed else [[0], [1], [2]])]  # eight rows for a mesh
    batch, tokens = make_batch(members)
    mesh = make_mesh(shape)
    with compute_context(mesh, "float32"):
        rows = jax.device_put((tokens, batch), jax.NamedSharding(mesh, BATCH))
        loss = jax.jit(functools.partial(loss_sum, model_config("pyramiddrop"), packed))(make_params(), *rows)
    losses = expected("pyramiddrop")[0]
    np.testing.assert_allclose(loss, sum(losses[member] for row in members for member in row), rtol=1e-5)


def layer_flops(rows, keys_beside=0):
    """Of one token's layers: products of a row, and of keys beside."""
    width, heads = LLM.width, LLM.heads * LLM.head_dim
    kv = 2 * width * 2 * LLM.kv_heads * LLM.head_dim
    matrices = rows * (2 * 2 * width * heads + kv + 3 * 2 * width * LLM.mlp) + keys_beside * kv
    return matrices, 2 * 2 * heads * (rows * rows / 2 + rows * keys_beside)


@pytest.mark.parametrize(
    ("method", "layers", "ranked"),
    [
        ("vica", [(N, N), (N, 0), (N, 0), (N, N), (N, 0)], ()),
        ("pyramiddrop", [(0, 0), (9, 0), (9, 0), (14, 0), (14, 0)], (0, 9)),
        ("hidrop", [(N, 0), (0, 0), (11, 0), (11, 0), (N, 0)], (0,)),
    ],
)
def test_flops_of_a_step_are_those_of_the_schedule(method, layers, ranked):
    """Of ``layers``: how many tokens of an image are not in its rows, and beside; ``ranked``: those of each drop."""
    length, rules = 80, (("llm/.*", "train"), (".*", "freeze"))
    config = dataclasses.replace(model_config("vica"), schedule=NAMES[method])
    counted = [
        step_flops(model, rules, 1, length, IMAGES) for model in (dataclasses.replace(config, schedule=""), config)
    ]

    def decoder(layers, ranked):
        each = [layer_flops(length - IMAGES * missing, IMAGES * beside) for missing, beside in layers]
        head = 2 * (length - IMAGES * layers[-1][0]) * LLM.width * LLM.vocab
        total = 3 * (sum(matrices + attention for matrices, attention in each) + head)
        for missing in ranked:
            rows = length - IMAGES * missing
            projections = 2 * rows * LLM.width * (LLM.heads + LLM.kv_heads) * LLM.head_dim
            total += projections + 2 * rows * rows * LLM.heads * LLM.head_dim
        return total

    assert counted[1] - counted[0] == decoder(layers, ranked) - decoder([(0, 0)] * LLM.layers, ())
    assert decode_flops(config, 1, length, IMAGES) <= decode_flops(dataclasses.replace(config, schedule=""), 1, length)


def test_presets_are_the_published_layers():
    def plan(name, layers=32):
        return [(stage.after, stage.keep) for stage in plan_schedule(name, layers, 576)]

    assert plan("pyramiddrop") == [(8, 288), (16, 144), (24, 72)]
    assert plan("hidrop") == [(0, 0), (8, 576), (10, 215), (14, 10), (16, 5), (18, 1), (24, 0)]
    assert plan("vica_7b") == plan("vica") == [(0, 576), (2, 0), (7, 576), (12, 0), (14, 576), (15, 0)]
    assert [after for after, keep in plan("vica_13b", 40) if keep] == [0, 6, 8, 13, 16]

    def average(name):
        config = dataclasses.replace(tiny().model, vision="", llm="", fusion=FusionConfig("mlp"), schedule=name)
        return resolve_model(config).reduction.average_tokens(32)

    assert [average(name) for name in ("hidrop", "hidrop:keep=87+10+5+1", "pyramiddrop", "vica_7b")] == [
        64,
        48,
        270,
        144,
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vca", "Unknown model.schedule 'vca'; did you mean 'vica'?"),
        ("vica:layers=4", "model.schedule=vica:layers=4: layers contains 4, but the language model's layers"),
        ("hidrop:enter=3,layers=2,keep=1,exit=1", "enter before layer 3, are dropped before 2, and leave before 1;"),
        ("hidrop:enter=1,layers=2,keep=17,exit=3", "17 image tokens per image after layer 2 must be 0 to 16"),
        ("pyramiddrop:after=1+2,keep=4+8", "8 image tokens per image after layer 2 must be 0 to 4, the number there."),
        ("pyramiddrop:after=2+1", "its stages begin after layers 2, 1, which must ascend."),
        ("pyramiddrop:after=4", "a stage begins after layer 4, but the language model has 4 layers."),
        ("pyramiddrop:keep=4", "it drops 3 times, but keep has 1 numbers."),
        ("tiny:TOKENIZER", "model.schedule=tiny:TOKENIZER is not a Schedule of stf_jax.models.schedules.base."),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_end_with_a_sentence(name, message):
    with pytest.raises(UserError) as error:
        plan_schedule(name, 4, N)
    assert message in str(error.value)


# ---- Runs and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_rows_have_room_for_their_text_in_every_stage(packing):
    changes = {"model.fusion.fusion": "mlp", "data.packing": packing, "data.images_per_row": 3, "data.max_length": 220}
    changes |= {"data.scenes.size": 48}

    def longest_text(schedule):
        return max(
            ((batch.segment_ids > 0) & (batch.image_slots < 0)).sum(1).max()
            for batch in batches(tiny(**changes, **{"model.schedule": schedule}), 3)
        )

    room = 220 - 3 * N
    assert longest_text("vica:layers=0") <= room
    assert longest_text("pyramiddrop:after=1,keep=4") <= 220 - 3 * (N - 4)
    assert longest_text("") > room


def test_rows_without_room_for_text_are_refused(capsys, tmp_path):
    options = [f"--config={tiny_module.__file__}:fusion=mlp", f"--workdir={tmp_path / 'run'}"]
    options += ["--config.model.schedule=vica:layers=0", "--config.data.images_per_row=12"]
    assert run_command(main.main, options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: data.max_length=192 leaves no room for text: with model.schedule, the image tokens "
        "of data.images_per_row=12 take up to 192 of it; raise it."
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_keeps_its_schedule_and_what_cannot_follow_it_says_so(tmp_path, capsys):
    changes = {"model.fusion.fusion": "mlp", "model.schedule": "vica:layers=0"}
    folder = make_model(tmp_path / "model", **changes)
    assert open_model(epath.Path(folder)).config.schedule == "vica:layers=0"
    assert run_command(convert.main, ["export", str(folder), "--format=hf", f"--to={tmp_path / 'export'}"]) == 2
    assert capsys.readouterr().err.endswith(
        "was trained with schedule=vica:layers=0, which PyTorch's classes cannot follow yet; only --format=native "
        "exports it.\n"
    )
    assert not (tmp_path / "export").exists()
    with pytest.raises(UserError, match=r"Distillation compares all positions, but model.schedule=vica:layers=0 drops"):
        find_teacher(tiny(objective=f"distill:teacher={folder}"), ())
    with pytest.raises(
        UserError, match="reduce=fastv:after=1 drops image tokens in the decoder, where schedule=vica already"
    ):
        resolve_model(tiny(**changes | {"model.schedule": "vica", "model.reduce": "fastv:after=1"}).model).reduction  # noqa: B018


def test_several_budgets_are_refused():
    model = tiny(**{"model.schedule": "vica", "model.fusion.budgets": (4, 1)}).model
    with pytest.raises(UserError, match=r"plans one number of image tokens per image, and .*budgets has 2; choose one"):
        resolve_model(model).reduction  # noqa: B018


def test_a_block_that_cannot_see_tokens_beside_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "plugins")
    with pytest.raises(UserError, match=r"model.schedule=vica needs Llama's block, but olmo:OLMO has another"):
        blueprint(tiny(**{"model.llm": "olmo:TINY", "model.schedule": "vica"}).model)
