"""LLaVA-STF (arXiv 2506.07138) in PyTorch: a vision tower read through taps, MBTF, STF, and a language model.

Tower and language model are transformers' own. Axis letters: B rows, I pictures, T positions, P patches (a grid of
g×g), N image tokens a picture, C tower width, D language model width, k patches a side of a window.
"""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_stf import LlavaSTFConfig


class LlavaSTFPreTrainedModel(PreTrainedModel):
    """What both models below declare to transformers."""

    config_class = LlavaSTFConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
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
        self.vision_tower = getattr(tower, "vision_model", tower)  # older releases wrap it once more
        self.vision_tower.post_layernorm = nn.Identity()  # above every tap
        self.language_model = AutoModel.from_config(config.text_config)

        fusion, width = config.stf_config, config.vision_config.hidden_size
        self.kernel = 1 if fusion["fusion"] == "mbtf" else fusion["kernel"]
        self.class_token = hasattr(self.vision_tower.embeddings, "class_embedding")
        paper = fusion["variant"] == "paper"
        if fusion["fusion"].startswith("mbtf"):
            hidden, mixed = fusion["mbtf_hidden"], fusion["mbtf_width"]
            layers = [nn.Linear(len(fusion["taps"]) * width, hidden), nn.GELU(), nn.Linear(hidden, mixed)]
            self.mm_projector_crosslayer = nn.Sequential(*layers, *[nn.GELU()] * paper)
            width = mixed
        else:
            self.mm_projector_crosslayer = nn.Identity()
        out = config.text_config.hidden_size
        window = width if fusion["fusion"] == "avg_pool" else self.kernel**2 * width
        if not fusion["fusion"].endswith("stf"):
            sizes = [window, out, out]
        elif paper:
            sizes = [window, window, fusion["stf_hidden"], out]
        else:
            sizes = [window, fusion["stf_hidden"], out]
        layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
        ends_in_gelu = paper and fusion["fusion"].endswith("stf")
        self.mm_projector = nn.Sequential(*(layers if ends_in_gelu else layers[:-1]))
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """Image tokens [I, N, D] of normalised pictures [I, 3, H, W], row by row."""
        states = self.vision_tower(pixel_values.to(self.dtype), output_hidden_states=True).hidden_states
        x = torch.cat([states[tap][:, int(self.class_token) :] for tap in self.config.stf_config["taps"]], dim=-1)
        x = self.mm_projector_crosslayer(x)
        return self.mm_projector(self._windows(x))

    def _windows(self, x):
        """The values of each k×k window [I, N, …] of states [I, P, C]."""
        fusion, k = self.config.stf_config["fusion"], self.kernel
        if k == 1:
            return x
        images, patches, width = x.shape
        grid = math.isqrt(patches)
        n = math.ceil(grid / k)
        x = F.pad(x.view(images, grid, grid, width), (0, 0, 0, n * k - grid, 0, n * k - grid))
        x = x.view(images, n, k, n, k, width).transpose(2, 3)
        if fusion == "avg_pool":
            x = x.mean((3, 4))
        elif fusion == "pixel_shuffle":  # patch by patch
            x = x.flatten(3)
        else:  # channel by channel, as the authors' layers read it
            x = x.permute(0, 1, 2, 5, 3, 4).flatten(3)
        return x.flatten(1, 2)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Reads text with image tokens in the places of ``<image>``.

        Args:
          input_ids: [B, T]; ``config.image_token_id`` stands N times for each picture. Or ``inputs_embeds`` [B, T, D],
            in which image tokens have taken their places already.
          pixel_values: [I, 3, H, W], pictures in the order in which the rows name them.
          kwargs: go to the language model, and so to its attention.

        Raises:
          ValueError: pictures and places do not match, or not one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            is_image = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            if pixel_values is not None:
                tokens = self.get_image_features(pixel_values).flatten(0, 1)
                if int(is_image.sum()) != len(tokens):
                    raise ValueError(f"The text has {int(is_image.sum())} places for {len(tokens)} image tokens.")
                tokens = tokens.to(inputs_embeds.device, inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], tokens)
            elif is_image.any():
                raise ValueError("The text names pictures, but there are no pixel_values.")
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
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

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """As :meth:`LlavaSTFModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], or of the last ``logits_to_keep`` positions.

        With ``labels`` [B, T] (−100 where nothing is learned) also the mean next-token loss. Otherwise as
        :meth:`LlavaSTFModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Repeats each row with its own pictures, for beams: rows a, a, b, b take pictures of a, of a, of b, of b."""
        pixels = kwargs.pop("pixel_values", None)
        rows, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixels is not None and expand_size > 1:
            places = (input_ids == self.config.image_token_id).sum(-1)
            counts = places * len(pixels) // places.sum()
            pixels = torch.cat([own.repeat(expand_size, 1, 1, 1) for own in pixels.split(counts.tolist())])
        return rows, kwargs | {"pixel_values": pixels}

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, **kwargs):
        """Pictures enter with the positions that name them; with a cache these are read once."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        read = inputs.get("input_ids")
        if read is not None and (read == self.config.image_token_id).any():
            inputs["pixel_values"] = pixel_values
        return inputs
