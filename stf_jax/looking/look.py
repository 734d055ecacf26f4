"""One look: a model's answer to a question about an image, with the maps that explain it, as numpy arrays.

Axis letters: as in attribution.py; Q patches of the canvas on which an image's squares are (canvas.py).
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from stf_jax.config import UserError
from stf_jax.data.records import make_question
from stf_jax.data.tiles import Grid, choose_grid, place_slots
from stf_jax.evals.benchmark import BLANK_COLOR
from stf_jax.inference.generator import Generator
from stf_jax.looking.attribution import TokenMaps, map_answer, map_tokens
from stf_jax.looking.canvas import Canvas, make_canvas
from stf_jax.models.reducers.base import Reduction
from stf_jax.models.vlm import VLM

MAX_NEW_TOKENS = 64
_ANSWER = 8  # tokens of an answer for which the maps are compiled; more if it is longer


@dataclasses.dataclass(frozen=True)
class Look:
    """What a model answered, and why.

    Attributes:
      name: of the method.
      question, answer: texts.
      pieces: the text of each of the answer's tokens, [A]; empty for the token that ends it.
      probabilities: of each token of the answer, given those before it, [A].
      blank_answer: the answer to the same question about a blank image.
      blank_probability: of ``answer``, if the image is blank.
      milliseconds: from the question to the answer, without compilation.
      reduction: what was dropped.
      pixels: the canvas of what the tower reads, uint8 [H, W, 3].
      grid: rows and columns of patches of ``pixels``.
      tiles: rows and columns of the image's tiles; None for an image of one square.
      patches: those that the tower reads, in all squares. The canvas may have more.
      taps: the tower's blocks that the fusion reads, deepest first.
      sources: the share of each patch in each token, float32 [S, Q]; rows sum to one, but those of newline tokens to 0.
      stated: whether ``sources`` are what the fusion's class states, or shares of ``movement``.
      movement: of each token's length, by the state of each tap at each patch, float32 [S, M, Q].
      attention: of the position that predicts each token of the answer to each image token, in each layer, averaged
        over heads, float32 [L, A, S]. The rest, up to one, is attention to text.
      dependence: movement of the logit of each token of the answer by each image token, float32 [A, S].
      reads: which image tokens each decoder layer reads, bool [L, S].
    """

    name: str
    question: str
    answer: str
    pieces: Sequence[str]
    probabilities: np.ndarray
    blank_answer: str
    blank_probability: float
    milliseconds: float
    reduction: Reduction
    pixels: np.ndarray
    grid: tuple[int, int]
    tiles: Grid | None
    patches: int
    taps: Sequence[int]
    sources: np.ndarray
    stated: bool
    movement: np.ndarray
    attention: np.ndarray
    dependence: np.ndarray
    reads: np.ndarray

    @property
    def probability(self) -> float:
        """The probability of the complete answer."""
        return float(np.prod(self.probabilities))


def look_at(
    generator: Generator, image: PIL.Image.Image, question: str, name: str, max_new_tokens: int = MAX_NEW_TOKENS
) -> Look:
    """Asks a model about an image, and maps its answer, with greedy decoding.

    Raises:
      UserError: the model has no vision tower, the question is too long for it, or the mesh splits rows.
    """
    if generator.row_shards > 1:
        raise UserError("A look reads one row, so data and fsdp of the mesh must be 1 (--mesh=1,1,N).")
    blank = PIL.Image.new("RGB", image.size, BLANK_COLOR)
    record, blank_record = (make_question("look", [one.copy], question) for one in (image, blank))
    prompt = generator.prompt(record)
    tokens, is_image = jnp.asarray(prompt.tokens), jnp.asarray(prompt.is_image)
    squares, blank_squares = generator.squares(image), generator.squares(blank)
    slots = place_slots(prompt.image_slots, 0, len(squares) * generator.slots)[prompt.is_image]

    def map_squares(squares: np.ndarray) -> list[TokenMaps]:
        return [generator.apply(map_tokens, jnp.asarray(square), tokens, ~is_image) for square in squares]

    def read_tokens(made: Sequence[TokenMaps]) -> np.ndarray:
        """The image tokens that the language model reads, [S, D]."""
        each = [np.asarray(maps.tokens) for maps in made]
        if generator.model.newline:
            each.append(np.asarray(generator.apply(_find_newline))[None].astype(each[0].dtype))
        return np.concatenate(each)[slots]

    def map_first() -> list[TokenMaps]:
        made = map_squares(squares)
        generator.compile(map_answer, read_tokens(made), tokens, is_image, jnp.zeros(_ANSWER, jnp.int32))
        return made

    with ThreadPoolExecutor(1) as pool:  # compiles the maps beside the programs that answer
        mapped = pool.submit(map_first)
        blank_answer = generator.answer_tokens(blank_record, max_new_tokens)
        made = mapped.result()
    begin = time.perf_counter()
    answer = generator.answer_tokens(record, max_new_tokens)
    milliseconds = 1000 * (time.perf_counter() - begin)
    count = len(answer)
    # Programs are compiled for powers of two, so that few answers need a new one.
    padded = jnp.asarray(np.pad(answer, (0, max(_ANSWER, 1 << (count - 1).bit_length()) - count)))
    maps, blank_maps = (
        generator.apply(map_answer, read_tokens(one), tokens, is_image, padded)
        for one in (made, map_squares(blank_squares))
    )
    spec = generator.model
    vision = spec.vision_shape
    assert vision is not None  # it has read the image
    pixels = np.stack([one.pixels for one in made])
    tiles = None if generator.tiles is None else choose_grid(image.size, generator.tiles.grids, vision.image_size)
    canvas = make_canvas((pixels.shape[1] // vision.patch_size, pixels.shape[2] // vision.patch_size), tiles)
    movement, stated = _put_on(canvas, [one.movement for one in made], slots), made[0].sources is not None
    if stated:
        sources = _put_on(canvas, [one.sources for one in made], slots)
    else:
        moved = movement.sum(1)
        sources = moved / np.maximum(moved.sum(1, keepdims=True), 1e-30)
    log_probs, blank_log_probs = (np.asarray(one.log_probs)[:count] for one in (maps, blank_maps))
    texts = [generator.decode_text(answer[:end]) for end in range(count + 1)]
    return Look(
        name=name,
        question=question,
        answer=texts[-1],
        pieces=[text[len(before) :] for before, text in itertools.pairwise(texts)],
        probabilities=np.exp(log_probs),
        blank_answer=generator.decode_text(blank_answer),
        blank_probability=float(np.exp(blank_log_probs.sum())),
        milliseconds=milliseconds,
        reduction=spec.reduction,
        pixels=canvas.draw(pixels, vision.patch_size),
        grid=canvas.grid,
        tiles=tiles,
        patches=canvas.places.size,
        taps=spec.taps,
        sources=sources,
        stated=stated,
        movement=movement,
        attention=np.asarray(maps.attention)[:, :count, np.flatnonzero(prompt.is_image)],
        dependence=np.asarray(maps.movement)[:count],
        reads=np.asarray(maps.reads),
    )


def _find_newline(model: VLM) -> jax.Array:
    return model.fusion.newline[...]


def _put_on(canvas: Canvas, maps: Sequence[Any], slots: np.ndarray) -> np.ndarray:
    """Puts maps of the tokens of squares, [N, …, P] each, on the canvas for the tokens of these slots: [S, …, Q]."""
    values = np.concatenate([np.asarray(one) for one in maps])
    count, squares = len(values), slots // len(maps[0])
    return canvas.spread(values[np.minimum(slots, count - 1)], squares)  # newline tokens have no map
