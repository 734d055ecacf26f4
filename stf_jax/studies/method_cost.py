"""What reading a prompt costs, and the part of it that is the method's own: its fusion and its reducer.

Axis letters: B rows, M images per row (or the tiles of one), T positions, P patches, S tokens in the tower, C tower
width, D language model width, H heads, K kv heads, Dh head size.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from stf_jax.accounting.memory import compiled_bytes
from stf_jax.config import MeshConfig, TrainConfig
from stf_jax.inference.decoding import Weights, merge_weights
from stf_jax.models.blueprint import Blueprint, blueprint
from stf_jax.models.decoders.rows import Rows
from stf_jax.models.reducers.base import Question
from stf_jax.models.spec import ModelSpec, resolve_model
from stf_jax.models.stages import Layout
from stf_jax.models.towers.vit import VisionTower
from stf_jax.parallel.mesh import compute_context
from stf_jax.planning.program import make_program
from stf_jax.training.flops import prefill_flops
from stf_jax.training.timing import make_batch

_Call = Callable[[], object]


def measure_methods(configs: Sequence[TrainConfig], rounds: int) -> list[dict[str, Any]]:
    """Measures what methods cost, on one device, with random weights, on which times do not depend.

    The methods take turns in each round, so that what slows the machine slows all of them. Two programs are timed: the
    prefill of :class:`stf_jax.inference.generator.Generator`, from images and prompts in memory to first tokens; and
    :func:`run_method`.

    Args:
      configs: of each method: ``model``, ``global_batch_size`` rows, and prompts of ``data.max_length`` tokens with one
        image.
      rounds: of which the medians are taken, after a warm-up.

    Returns:
      For each method what ``cost.json`` has (docs/comparing.md).
    """
    leaves: dict[Any, jax.Array] = {}  # methods share the weights of tower and decoder
    costs, calls = [], list[_Call]()
    for config in configs:
        prefill, own, memory = _compile(config, leaves)
        costs.append(_describe(config) | {"prefill_mib": memory / 2**20})
        calls += [prefill, own]
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):  # the first one is a warm-up
        for call, times in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - begin)
    medians = [1e3 * statistics.median(times[1:]) for times in seconds]
    return [
        cost | {"first_token_ms": first, "method_ms": own}
        for cost, first, own in zip(costs, medians[::2], medians[1::2], strict=True)
    ]


def _describe(config: TrainConfig) -> dict[str, Any]:
    model = resolve_model(config.model)
    cost: dict[str, Any] = {
        "image_tokens": model.reduction.keep,
        "prefill_gflops": sum(prefill_flops(model, 1, config.data.max_length, config.data.image_places).values()) / 1e9,
        "first_token_rows": config.global_batch_size,
        "device": jax.devices()[0].device_kind,
    }
    if model.reduction.stages:
        assert model.llm_shape is not None  # its layers drop the tokens
        cost["average_image_tokens"] = model.reduction.average_tokens(model.llm_shape.layers)
    return cost


def _compile(config: TrainConfig, leaves: dict[Any, jax.Array]) -> tuple[_Call, _Call, int]:
    """Compiles both programs of a method; returns their calls, and the bytes that its prefill needs."""
    config = dataclasses.replace(config, mesh=MeshConfig(1, 1, 1))
    program = make_program(config, "prefill", jax.devices()[:1], rows=config.global_batch_size)
    plan, batch, dtype = blueprint(config.model), make_batch(config), jnp.dtype(program.precision)
    model = resolve_model(config.model)

    values = (0.1 * np.random.default_rng(0).standard_normal(2**20, np.float32)).astype(dtype)

    def noise(name: Any, shape: Sequence[int]) -> jax.Array:
        key = (name, tuple(shape), dtype)
        if key not in leaves:
            leaves[key] = jnp.asarray(np.resize(values, shape))
        return leaves[key]

    with compute_context(program.mesh, program.precision):
        compiled = program.compile()
        weights = jax.tree.map_with_path(lambda path, leaf: noise(path, leaf.shape), program.parts["parameters"])
        lengths = np.full(program.rows, program.length, np.int32)
        prompt = jax.device_put((batch.tokens, batch.image_slots, lengths, batch.images), jax.devices()[0])
        prefill = functools.partial(compiled, weights, *prompt, program.arguments[-1])
        known = _make_states(model, program.rows, program.images, program.length, noise)
        own = jax.jit(functools.partial(run_method, plan)).lower(weights, *prompt, *known).compile()
    call = functools.partial(own, weights, *prompt, *known)
    return prefill, call, compiled_bytes(compiled)


def _make_states(
    model: ModelSpec, rows: int, images: int, length: int, noise: Callable[[str, Sequence[int]], jax.Array]
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array, jax.Array]:
    """Makes what :func:`run_method` gets from tower and decoder: states, hidden states, queries and keys."""
    vision, llm = model.vision_shape, model.llm_shape
    assert vision is not None  # only complete models are measured
    assert llm is not None
    state = noise("states", (rows * images, vision.grid**2 + vision.class_token, vision.width))
    # One array for all blocks: only those that a method reads are passed on to its program.
    return (
        (state,) * (vision.layers + 1),
        noise("hidden", (rows, length, llm.width)),
        noise("queries", (rows, length, llm.heads, llm.head_dim)),
        noise("keys", (rows, length, llm.kv_heads, llm.head_dim)),
    )


def run_method(
    plan: Blueprint,
    weights: Weights,
    tokens: Int[Array, "B T"],
    slots: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    images: UInt8[Array, "B M side side 3"],
    states: tuple[Float[Array, "B*M S C"], ...],
    hidden: Float[Array, "B T D"],
    queries: Float[Array, "B T H Dh"],
    keys: Float[Array, "B T K Dh"],
) -> tuple[Any, ...]:
    """Runs what a method adds to tower and decoder, whose results are given: what it does to the image, the fusion, and
    the ranking and gathering of what is kept.

    Args:
      states: after the tower's embedding and each of its blocks, with the class token if there is one.
      hidden, queries, keys: of any decoder layer.

    Returns:
      All that the method computes, so that the compiler leaves nothing out.
    """
    model = merge_weights(plan, weights)
    reduction, known, is_image = model.reduction, _Known(model.vision, states), slots >= 0
    question = jax.tree.map(lambda x: jnp.repeat(x, images.shape[1], axis=0), Question(tokens, ~is_image))
    squares = images.reshape(-1, *images.shape[2:])
    read = reduction.tower_states(_KnownTower(known), squares, model.taps, model.dtype, question)
    results: list[Any] = [known.seen, reduction.reduce_tokens(model.fusion(read))]
    rows = Rows(hidden, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    if reduction.schedule is None:
        selections, _ = reduction.select_tokens(is_image, lengths, 1, model.llm.norm)
    else:
        layout = Layout(is_image, (rows.positions < lengths[:, None]).astype(jnp.int32))
        selections, _ = reduction.follow_schedule(layout, rows, 1)
    for selection in selections:
        q, k = queries[:, : rows.x.shape[1]], keys[:, : rows.x.shape[1]]
        if selection.scored_by == "next":
            q, k = model.llm.query_key(rows.x, rows.positions, selection.after)
        rows = selection.apply(q, k, rows)
        results.append((rows.x, rows.positions))
    return tuple(results)


@dataclasses.dataclass
class _Known:
    """A tower, and its states after the embedding and each block.

    ``seen``: the images of each call. They are results of the program, or the compiler would leave out what a reducer
    does to them.
    """

    tower: VisionTower
    states: tuple[jax.Array, ...]
    seen: list[jax.Array] = dataclasses.field(default_factory=list)


class _KnownTower(VisionTower):
    """A tower whose states are known, so that a reducer that calls it can be timed without it."""

    def __init__(self, known: _Known) -> None:
        self._known = known  # in an object of its own, because a module's own attributes cannot be tuples of arrays

    def __getattr__(self, name: str) -> Any:
        return getattr(self._known.tower, name)

    def states(self, images: jax.Array, taps: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, ...]:
        del dtype
        self._known.seen.append(images)
        rows, columns = (length // self.config.patch_size for length in images.shape[1:3])
        return tuple(self._known.states[tap][:, : rows * columns + int(self.config.class_token)] for tap in taps)
