"""LLaVA-STF (arXiv 2506.07138) in PyTorch: a vision tower read through taps, a token fusion, and a language model.

The fusion is the connector in connector_stf.py, after MBTF if the model has it. Tower and language model are
transformers' own. Axis letters: B rows, I images, T positions, P patches (a grid of g×g), N image tokens per
image, C tower width, M taps, D language model width, k side of a window in patches.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple

from .configuration_stf import LlavaSTFConfig
from .connector_stf import Connector
from .tiles_stf import choose_grid, count_tokens, join_tiles


class LlavaSTFPreTrainedModel(PreTrainedModel):
    """Declarations to transformers that both models below share."""

    config_class = LlavaSTFConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 (names before and since 5.24)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class LlavaSTFModel(LlavaSTFPreTrainedModel):
    """Hidden states of the language model over text and image tokens, without its head."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        tower = AutoModel.from_config(config.vision_config)
        self.vision_tower = getattr(tower, "vision_model", tower)  # older releases wrap it
        for norm in config.stf_config["unused"]:  # above all taps
            setattr(self.vision_tower, norm, nn.Identity())
        self.language_model = AutoModel.from_config(config.text_config)

        fusion, vision = config.stf_config, config.vision_config
        self.class_token = fusion["class_token"]
        if fusion["crosslayer"]:
            sizes = len(fusion["taps"]) * vision.hidden_size, fusion["mbtf_hidden"], fusion["mbtf_width"]
            layers = [nn.Linear(*sizes[:2]), nn.GELU(), nn.Linear(*sizes[1:])]
            self.mm_projector_crosslayer = nn.Sequential(*layers, *[nn.GELU()] * (fusion["variant"] == "paper"))
        else:
            self.mm_projector_crosslayer = nn.Identity()
        self.side = vision.image_size // vision.patch_size
        self.mm_projector = Connector(config, fusion["side"])
        self.tiles = fusion.get("tiles")  # None: images have no tiles
        self.image_newline = None
        if self.tiles and self.tiles["marks"] == "newline":
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        num_image_tokens: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Computes the image tokens of normalized images [I, 3, H, W]; transformers 5 defines this method.

        Args:
          pixel_values: normalized images; with tiles [I, S, 3, H, W], a thumbnail, then tiles, then padding.
          image_sizes: with tiles the height and width of each image [I, 2].
          num_image_tokens: N, one of the model's budgets, if it has several; by default the first.
          kwargs: passed to the vision tower. ``return_dict=False`` returns a tuple.

        Returns:
          ``pooler_output``: the image tokens [I, N, D] in row-major order, with tiles a list of tokens [N, D]; and the
          tower's ``last_hidden_state`` and ``hidden_states``.

        Raises:
          ValueError: the model cannot make so many tokens.
        """
        sizes, grids = [], []
        if self.tiles:
            sizes, side = image_sizes.tolist(), self.config.vision_config.image_size
            grids = [choose_grid(size, self.config.image_grid_pinpoints, side) for size in sizes]
            pixel_values = torch.cat(
                [image[: 1 + math.prod(grid)] for image, grid in zip(pixel_values, grids, strict=True)]
            )
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        outputs = self.vision_tower(pixel_values.to(self.dtype), **kwargs)
        states = outputs.hidden_states
        x = torch.cat([states[tap][:, int(self.class_token) :] for tap in self.config.stf_config["taps"]], dim=-1)
        x = self.mm_projector_crosslayer(x).unflatten(1, (self.side, self.side))
        pad = self.config.stf_config["side"] - self.side
        tokens = self._project(F.pad(x, (0, 0, 0, pad, 0, pad)), num_image_tokens).flatten(1, -2)
        if self.tiles:
            images = tokens.split([1 + math.prod(grid) for grid in grids])
            tokens = [join_tiles(*image, self.image_newline) for image in zip(images, grids, sizes, strict=True)]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=tokens,
            hidden_states=states,
            attentions=outputs.attentions,
        )

    def _project(self, x, count):
        """Returns the tokens [I, ..., D] of patches, ``count`` per image."""
        budgets = self.config.stf_config["budgets"]
        if not budgets:
            return self.mm_projector(x)
        count = count or budgets[0]
        if count not in budgets:
            raise ValueError(f"The model makes {', '.join(map(str, budgets))} tokens per image, not {count}.")
        if hasattr(self.mm_projector, "nested"):
            return self.mm_projector.nested(x, count)
        side = math.isqrt(count)
        return self.mm_projector(x).unflatten(2, (side, -1)).unflatten(1, (side, -1)).mean((2, 4))

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        image_sizes=None,
        num_image_tokens=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the language model over text, with image tokens in place of ``<image>``.

        Args:
          input_ids: [B, T], with ``config.image_token_id`` N times per image. Alternatively ``inputs_embeds``
            [B, T, D], which already contains the image tokens.
          pixel_values, image_sizes: as of :meth:`get_image_features`, the images in the order of the rows.
          num_image_tokens: N, if the model has several budgets; by default as many as the text has placeholders for.
          kwargs: passed to the language model and its attention. They include its cache, whose name differs between
            releases. ``return_dict=False`` returns a tuple.

        Raises:
          ValueError: images and placeholders do not match, or not exactly one of ``input_ids`` and ``inputs_embeds`` is
            given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            is_image = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            if pixel_values is not None:
                count = None if self.tiles else num_image_tokens or int(is_image.sum()) // len(pixel_values)
                features = self.get_image_features(pixel_values, image_sizes, count, return_dict=True)
                tokens = torch.cat(list(features.pooler_output))
                if int(is_image.sum()) != len(tokens):
                    raise ValueError(f"The text has {int(is_image.sum())} placeholders for {len(tokens)} image tokens.")
                tokens = tokens.to(inputs_embeds.device, inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], tokens)
            elif is_image.any():
                raise ValueError("The text refers to images, but there are no pixel_values.")
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )


class LlavaSTFForConditionalGeneration(LlavaSTFPreTrainedModel, GenerationMixin):
    """The model with its language head: logits, loss and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.model = LlavaSTFModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        num_image_tokens: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Calls :meth:`LlavaSTFModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, num_image_tokens, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        image_sizes=None,
        num_image_tokens=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Computes logits [B, T, V], or those of the last ``logits_to_keep`` positions.

        With ``labels`` [B, T] (−100 for positions that are not targets) also the mean next-token loss. Other arguments
        are those of :meth:`LlavaSTFModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            num_image_tokens=num_image_tokens,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeats each row with its images for beam search: rows a, a, b, b get the images of a, a, b, b."""
        pixels, sizes = kwargs.pop("pixel_values", None), kwargs.pop("image_sizes", None)
        rows, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixels is not None and expand_size > 1:
            slots = (input_ids == self.config.image_token_id).sum(-1)
            counts = slots * len(pixels) // slots.sum()
            if sizes is not None:
                lengths = slots.new_tensor([self._count_tokens(size) for size in sizes.tolist()])
                counts = torch.searchsorted(lengths.cumsum(0), slots.cumsum(0), right=True)
                counts = counts.diff(prepend=slots.new_zeros(1))
                sizes = torch.cat([images.repeat(expand_size, 1) for images in sizes.split(counts.tolist())])
            repeats = (expand_size, *[1] * (pixels.dim() - 1))
            pixels = torch.cat([images.repeat(repeats) for images in pixels.split(counts.tolist())])
        return rows, kwargs | {"pixel_values": pixels} | ({} if sizes is None else {"image_sizes": sizes})

    def _count_tokens(self, size):
        """Returns how many tokens an image of that height and width has."""
        config = self.config
        grids = {"pinpoints": config.image_grid_pinpoints, "side": config.vision_config.image_size}
        return count_tokens(size, **config.stf_config["tiles"], **grids)

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, image_sizes=None, **kwargs):
        """Passes images only with positions that refer to them; with a cache, that is once."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids = inputs.get("input_ids")
        if ids is not None and (ids == self.config.image_token_id).any():
            inputs["pixel_values"] = pixel_values
            if image_sizes is not None:
                inputs["image_sizes"] = image_sizes
        return inputs
