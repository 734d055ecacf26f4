"""The complete model: vision tower, fusion, and a language model that reads image tokens among its text tokens.

Axis letters: B rows, T positions, M images per row (with tiles: squares that the tower reads), N tokens per image,
S tokens of all images of a row, K budgets but the first, D language model width, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from stf_jax.config import ModelConfig, UserError
from stf_jax.models.cells import CellHead
from stf_jax.models.chooser import Chooser
from stf_jax.models.decoders.base import find_decoder_class
from stf_jax.models.decoders.rows import Rows
from stf_jax.models.decoders.transformer import Block, Cache
from stf_jax.models.fusions.base import Fusion
from stf_jax.models.layers import shard_rows
from stf_jax.models.reducers.base import Question
from stf_jax.models.spec import resolve_model
from stf_jax.models.stages import Layout
from stf_jax.models.towers.base import find_tower_class

States = Mapping[int, jax.Array]  # of a tower, [B·M, P, C] by tap


class VLM(nnx.Module):
    """Vision tower, fusion and decoder, with parameters under ``vision/``, ``fusion/`` and ``llm/``.

    With ``model.cells``, the head that trains a tower is under ``cells/``; with ``model.chooser``, the head that
    chooses an image's budget is under ``chooser/``. A frozen teacher of the model's training is under ``teacher/``,
    without the parts that it shares (models/blueprint.py).

    A language model alone (a ModelSpec without ``vision_shape``) has no tower and no fusion, and accepts no images.

    Attributes:
      slots: image tokens per image in a row.
      known_tokens: the image tokens of the images that are read, [B, M·N, D], where training has them already
        (training/budgets.py).
    """

    teacher: "VLM"
    known_tokens: jax.Array | None = None

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig) -> None:
        """Builds the model.

        Raises:
          UserError: an unknown preset or fusion, a kernel that does not divide the grid, an invalid reduction, or a
            schedule that the language model's block cannot follow; or a chooser without several budgets.
        """
        spec = resolve_model(config)
        vision, llm = spec.vision_shape, spec.llm_shape
        self.dtype = jnp.dtype(config.precision)
        self.reduction, self.slots = spec.reduction, spec.slots
        assert llm is not None  # there is no VLM of a tower alone
        if vision is not None:
            self.taps = spec.taps
            # Splash supports only causal attention.
            vision_attention = "auto" if config.attention == "splash" else config.attention
            self.vision = find_tower_class(vision)(
                rngs, vision, scan=config.scan_layers, remat=config.remat, attention=vision_attention
            )
            self.fusion = Fusion(rngs, config.fusion, vision, llm.width, spec.reduction.tokens, spec.newline)
            if config.cells:
                self.cells = CellHead(rngs, vision, config.cells)
            if config.chooser:
                self.chooser = Chooser(rngs, config.fusion.budgets, vision.width, len(self.taps))
        decoder = find_decoder_class(llm)
        if any(stage.beside for stage in self.reduction.stages) and decoder.block is not Block:
            raise UserError(f"model.schedule={config.schedule} needs Llama's block, but {llm.family} has another.")
        self.llm = decoder(rngs, llm, scan=config.scan_layers, remat=config.remat, attention=config.attention)

    def image_tokens(
        self,
        images: UInt8[Array, "B M H W 3"],
        question: Question | None = None,
        states: States | None = None,
    ) -> Float[Array, "B S D"]:
        """Image tokens of a row's images, one after another; and behind them the newline token, if the model has one.

        Args:
          question: the text of each row, if there is one.
          states: those of the tower, if they are known.
        """
        if self.known_tokens is not None:
            return self.known_tokens
        batch, count = images.shape[:2]
        if states is None:
            images = images.reshape(batch * count, *images.shape[2:])
            question = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), question)
            tapped = self.reduction.tower_states(self.vision, images, self.taps, self.dtype, question)
        else:
            tapped = tuple(states[tap] for tap in self.taps)
        tokens = self.reduction.reduce_tokens(self.fusion(tapped))
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        if not hasattr(self.fusion, "newline"):
            return tokens
        newline = self.fusion.newline.astype(tokens.dtype)
        return jnp.concatenate([tokens, jnp.broadcast_to(newline, (batch, 1, len(newline)))], axis=1)

    def nested_tokens(
        self, images: UInt8[Array, "B M H W 3"], budgets: Sequence[int], states: States | None = None
    ) -> tuple[Float[Array, "B _ D"], ...]:
        """Image tokens of a row's images at each of some budgets; the tower runs once, or not if states are known."""
        states = self.tower_states(images, self.taps) if states is None else states
        nested = self.fusion.nested(tuple(states[tap] for tap in self.taps), budgets)
        return tuple(tokens.reshape(len(images), -1, tokens.shape[-1]) for tokens in nested)

    def tower_states(self, images: UInt8[Array, "B M H W 3"], taps: Iterable[int]) -> States:
        """The tower's states after these blocks, of all images of all rows."""
        taps = tuple(taps)
        return dict(zip(taps, self.vision(images.reshape(-1, *images.shape[2:]), taps, self.dtype), strict=True))

    def expected_divergences(
        self, images: UInt8[Array, "B M H W 3"], states: States | None = None
    ) -> Float32[Array, "B M K"]:
        """What the chooser expects answers to lose at each budget but the first (models/chooser.py).

        Args:
          states: those of the tower, if they are known.
        """
        states = self.tower_states(images, self.taps) if states is None else states
        expected = self.chooser(tuple(states[tap] for tap in self.taps))
        return expected.reshape(*images.shape[:2], -1)

    def cell_scores(self, images: UInt8[Array, "B M H W 3"]) -> Float32[Array, "B*M S S classes"]:
        """Scores of all cells (models/cells.py)."""
        images = images.reshape(-1, *images.shape[2:])
        return self.cells(self.vision(images, self.taps[:1], self.dtype)[0])

    def embed(
        self,
        tokens: Int[Array, "B T"],
        image_slots: Int[Array, "B T"],
        image_tokens: Float[Array, "B S D"] | None,
    ) -> Float[Array, "B T D"]:
        """Text embeddings with the image tokens in their slots.

        The data pipeline lays out the slots, so there is no search here: each position gathers its token.

        Args:
          tokens: of the text; ignored at image slots.
          image_slots: index into the row's image tokens, −1 for text.
          image_tokens: as of :meth:`image_tokens`, or None for rows without images.
        """
        if image_tokens is None:
            return self.llm.embed(tokens, self.dtype)
        is_image = image_slots >= 0
        # Indices out of range get zeros. With index 0 for what is not read, all these positions would add a zero to one
        # row of the gradient, which GPUs do one after another.
        x = self.llm.embed(jnp.where(is_image, -1, tokens), self.dtype)
        slots = jnp.where(is_image, image_slots, image_tokens.shape[1])[:, :, None]
        gathered = jnp.take_along_axis(image_tokens, slots, axis=1, mode="fill", fill_value=0)
        return jnp.where(is_image[:, :, None], gathered, x)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        image_slots: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        images: UInt8[Array, "B M H W 3"],
    ) -> tuple[Float[Array, "B D"], Cache, Int[Array, " B"]]:
        """Reads prompts, so that the decoder can continue from them.

        Args:
          tokens, image_slots: as for :meth:`embed`; positions beyond a prompt are ignored.
          lengths: of prompts. Where the decoder drops image tokens, T must be at least the length of each
            prompt plus what the decoder would drop of the images, up to M, that its row lacks.
          images: M may be 0.

        Returns:
          The last token's hidden state after the final norm; the cache, one slot per position that a layer sees; and
          the number of images of each prompt.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        is_image = image_slots >= 0
        question = Question(tokens, ~is_image & (positions < lengths[:, None]))
        image_tokens = self.image_tokens(images, question) if images.shape[1] else None
        x = shard_rows(self.embed(tokens, image_slots, image_tokens))
        if self.reduction.schedule is None:
            selections, _ = self.reduction.select_tokens(is_image, lengths, images.shape[1], self.llm.norm)
        else:
            layout = Layout(is_image, (positions < lengths[:, None]).astype(jnp.int32))
            selections, _ = self.reduction.follow_schedule(layout, Rows(x, positions), images.shape[1])
        hidden, cache = self.llm.prefill(x, positions, selections)
        image_counts = is_image.sum(1) // max(self.reduction.slots, 1)
        last = lengths - image_counts * self.reduction.rows_dropped_at_end - 1
        return jnp.take_along_axis(hidden, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0], cache, image_counts

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        image_slots: Int[Array, "B T"],
        images: UInt8[Array, "B M H W 3"],
        states: States | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of the decoder after its final norm.

        Args:
          tokens, positions: positions start at 0 in each segment.
          segment_ids: conversations of a packed row, or None where each row is one conversation.
          image_slots: as in :meth:`embed`.
          images: M may be 0.
          states: those of the tower, if they are known.

        Raises:
          UserError: the model has a schedule, so that not every position has a hidden state; see :meth:`predict`.
        """
        if self.reduction.schedule is not None:
            raise UserError("With model.schedule not every position has a hidden state; use VLM.predict.")
        return self.llm(self._embed_rows(tokens, image_slots, images, states), positions, segment_ids)

    def _embed_rows(
        self, tokens: jax.Array, image_slots: jax.Array, images: jax.Array, states: States | None = None
    ) -> jax.Array:
        image_tokens = self.image_tokens(images, states=states) if images.shape[1] else None
        return shard_rows(self.embed(tokens, image_slots, image_tokens))

    def predict(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        loss_mask: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        image_slots: Int[Array, "B T"],
        images: UInt8[Array, "B M H W 3"],
        packed: bool,
    ) -> tuple[Float[Array, "B T1 D"], Int[Array, "B T1"], Bool[Array, "B T1"]]:
        """Hidden states of the positions that the last layer reads, the token that follows each, and which are learned.

        Without a schedule, these are all positions.

        Args:
          targets, loss_mask: the next token of each position, and which are learned.
          segment_ids: 0 for padding.
          packed: whether rows hold several conversations.
          tokens, positions, image_slots, images: as of :meth:`hidden`.
        """
        segments, x = segment_ids if packed else None, self._embed_rows(tokens, image_slots, images)
        layout = Layout(image_slots >= 0, segment_ids, jnp.pad(loss_mask, ((0, 0), (1, 0)))[:, :-1])
        selections, visible = self.reduction.follow_schedule(layout, Rows(x, positions, segments), images.shape[1])
        hidden = self.llm(x, positions, segments, selections)
        return hidden, *(visible.targets(tokens) if selections else (targets, loss_mask))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        image_slots: Int[Array, "B T"],
        images: UInt8[Array, "B M H W 3"],
    ) -> Float32[Array, "B T V"]:
        """Next-token logits of the arguments of :meth:`hidden`."""
        return self.llm.logits(self.hidden(tokens, positions, segment_ids, image_slots, images))
