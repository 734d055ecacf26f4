"""One look: a model's answer to a question about an image, with the maps that explain it, as numpy arrays."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import PIL.Image

from stf_jax.config import UserError
from stf_jax.data.records import make_question
from stf_jax.evals.benchmark import BLANK_COLOR
from stf_jax.inference.generator import Generator
from stf_jax.looking.attribution import TokenMaps, map_answer, map_tokens
from stf_jax.models.reducers.base import Reduction

MAX_NEW_TOKENS = 64
_ANSWER = 8  # tokens of an answer for which the maps are compiled; more if it is longer


@dataclasses.dataclass(frozen=True)
class Look:
    """What a model answered, and why. Axis letters: as in attribution.py; the patches are those of ``pixels``.

    Attributes:
      name: of the method.
      question, answer: texts.
      pieces: the text of each of the answer's tokens, [A]; empty for the token that ends it.
      probabilities: of each token of the answer, given those before it, [A].
      blank_answer: the answer to the same question about a blank image.
      blank_probability: of ``answer``, if the image is blank.
      milliseconds: from the question to the answer, without compilation.
      reduction: what was dropped.
      pixels: what the tower reads, uint8 [H, W, 3].
      grid: rows and columns of patches.
      taps: the tower's blocks that the fusion reads, deepest first.
      sources: the share of each patch in each token, float32 [S, P]; rows sum to one.
      stated: whether ``sources`` are what the fusion's class states, or shares of ``movement``.
      movement: of each token's length, by the state of each tap at each patch, float32 [S, M, P].
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
      UserError: the model has no vision tower, has a schedule or reads tiles, the question is too long for it, or the
        mesh splits rows.
    """
    if generator.row_shards > 1:
        raise UserError("A look reads one row, which data and fsdp of the mesh would split: use tensor alone (1,1,N).")
    if generator.model.schedule:
        raise UserError(f"A look cannot show a model with a schedule ({generator.model.schedule}); choose another.")
    if generator.tiles is not None:
        raise UserError("A look maps one square per image, but this model reads images in tiles (data.aspect=tiles).")
    blank = PIL.Image.new("RGB", image.size, BLANK_COLOR)
    record, blank_record = (make_question("look", [one.copy], question) for one in (image, blank))
    prompt = generator.prompt(record)
    tokens, is_image = jnp.asarray(prompt.tokens), jnp.asarray(prompt.is_image)

    def compute_tokens(image: PIL.Image.Image) -> TokenMaps:
        maps: TokenMaps = generator.apply(map_tokens, jnp.asarray(generator.squares(image)[0]), tokens, ~is_image)
        return maps

    def compute_tokens_first(image: PIL.Image.Image) -> TokenMaps:
        maps = compute_tokens(image)
        generator.compile(map_answer, maps.tokens, tokens, is_image, jnp.zeros(_ANSWER, jnp.int32))
        return maps

    with ThreadPoolExecutor(1) as pool:  # compiles the maps beside the programs that answer
        mapped = pool.submit(compute_tokens_first, image)
        blank_answer = generator.answer_tokens(blank_record, max_new_tokens)
        made = mapped.result()
    begin = time.perf_counter()
    answer = generator.answer_tokens(record, max_new_tokens)
    milliseconds = 1000 * (time.perf_counter() - begin)
    count = len(answer)
    # Programs are compiled for powers of two, so that few answers need a new one.
    padded = jnp.asarray(np.pad(answer, (0, max(_ANSWER, 1 << (count - 1).bit_length()) - count)))
    maps, blank_maps = (
        generator.apply(map_answer, one.tokens, tokens, is_image, padded) for one in (made, compute_tokens(blank))
    )
    spec = generator.model
    vision = spec.vision_shape
    assert vision is not None  # it has read the image
    movement, pixels = np.asarray(made.movement), np.asarray(made.pixels)
    moved = movement.sum(1)
    sources = moved / np.maximum(moved.sum(1, keepdims=True), 1e-30) if made.sources is None else made.sources
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
        pixels=pixels,
        grid=(pixels.shape[0] // vision.patch_size, pixels.shape[1] // vision.patch_size),
        taps=spec.taps,
        sources=np.asarray(sources),
        stated=made.sources is not None,
        movement=movement,
        attention=np.asarray(maps.attention)[:, :count, np.flatnonzero(prompt.is_image)],
        dependence=np.asarray(maps.movement)[:count],
        reads=np.asarray(maps.reads),
    )
