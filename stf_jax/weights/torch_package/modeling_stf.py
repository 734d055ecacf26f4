"""LLaVA-STF (arXiv 2506.07138) in PyTorch: a vision tower read through taps, MBTF, STF, and a language model.

Baseline fusions can replace MBTF and STF; the larger ones are classes at the end of this file. Tower and language
model are transformers' own. Axis letters: B rows, I images, T positions, P patches (a grid of g×g), N image tokens per
image, C tower width, M taps, D language model width, k side of a window in patches.
"""

import itertools
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
        self.vision_tower.post_layernorm = nn.Identity()  # above all taps, so never used
        self.language_model = AutoModel.from_config(config.text_config)

        fusion, width = config.stf_config, config.vision_config.hidden_size
        self.kernel = 1 if fusion["fusion"] == "mbtf" else fusion["kernel"]
        self.class_token = hasattr(self.vision_tower.embeddings, "class_embedding")
        is_paper = fusion["variant"] == "paper"
        if fusion["fusion"].startswith("mbtf"):
            hidden, mbtf_width = fusion["mbtf_hidden"], fusion["mbtf_width"]
            layers = [nn.Linear(len(fusion["taps"]) * width, hidden), nn.GELU(), nn.Linear(hidden, mbtf_width)]
            self.mm_projector_crosslayer = nn.Sequential(*layers, *[nn.GELU()] * is_paper)
            width = mbtf_width
        else:
            self.mm_projector_crosslayer = nn.Identity()
        out = config.text_config.hidden_size
        if fusion["fusion"] in BASELINE_FUSIONS:
            self.mm_projector = BASELINE_FUSIONS[fusion["fusion"]](config)
        else:
            self.mm_projector = self._make_projector(fusion, width, out)
        self.post_init()

    def _make_projector(self, fusion, width, out):
        """Returns linear layers over the values of a window."""
        is_paper = fusion["variant"] == "paper"
        window = width if fusion["fusion"] == "avg_pool" else self.kernel**2 * width
        if not fusion["fusion"].endswith("stf"):
            sizes = [window, out, out]
        elif is_paper:
            sizes = [window, window, fusion["stf_hidden"], out]
        else:
            sizes = [window, fusion["stf_hidden"], out]
        layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
        ends_in_gelu = is_paper and fusion["fusion"].endswith("stf")
        return nn.Sequential(*(layers if ends_in_gelu else layers[:-1]))

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Computes the image tokens of normalized images [I, 3, H, W]; transformers 5 defines this method.

        Args:
          pixel_values: normalized images.
          kwargs: passed to the vision tower. ``return_dict=False`` returns a tuple.

        Returns:
          ``pooler_output``: the image tokens [I, N, D] in row-major order; and the tower's ``last_hidden_state`` and
          ``hidden_states``.
        """
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        outputs = self.vision_tower(pixel_values.to(self.dtype), **kwargs)
        states = outputs.hidden_states
        x = torch.cat([states[tap][:, int(self.class_token) :] for tap in self.config.stf_config["taps"]], dim=-1)
        x = self.mm_projector_crosslayer(x)
        if self.config.stf_config["fusion"] in BASELINE_FUSIONS:
            tokens = self.mm_projector(_grid(x, self.mm_projector.side)).flatten(1, 2)
        else:
            tokens = self.mm_projector(self._windows(x))
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=tokens,
            hidden_states=states,
            attentions=outputs.attentions,
        )

    def _windows(self, x):
        """Groups states [I, P, C] into the values of each k×k window [I, N, …]."""
        fusion, k = self.config.stf_config["fusion"], self.kernel
        if k == 1:
            return x
        n = math.ceil(math.isqrt(x.shape[1]) / k)
        x = _grid(x, n * k).unflatten(2, (n, k)).unflatten(1, (n, k)).transpose(2, 3)
        if fusion == "avg_pool":
            x = x.mean((3, 4))
        elif fusion == "pixel_shuffle":  # patch by patch
            x = x.flatten(3)
        else:  # channel by channel, as in the authors' layers
            x = x.permute(0, 1, 2, 5, 3, 4).flatten(3)
        return x.flatten(1, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the language model over text, with image tokens in place of ``<image>``.

        Args:
          input_ids: [B, T], with ``config.image_token_id`` N times per image. Alternatively ``inputs_embeds``
            [B, T, D], which already contains the image tokens.
          pixel_values: [I, 3, H, W], the images in the order of the rows.
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
                tokens = self.get_image_features(pixel_values, return_dict=True).pooler_output.flatten(0, 1)
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

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Calls :meth:`LlavaSTFModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

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
        pixels = kwargs.pop("pixel_values", None)
        rows, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixels is not None and expand_size > 1:
            slots = (input_ids == self.config.image_token_id).sum(-1)
            counts = slots * len(pixels) // slots.sum()
            pixels = torch.cat([images.repeat(expand_size, 1, 1, 1) for images in pixels.split(counts.tolist())])
        return rows, kwargs | {"pixel_values": pixels}

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, **kwargs):
        """Passes images only with positions that refer to them; with a cache, that is once."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids = inputs.get("input_ids")
        if ids is not None and (ids == self.config.image_token_id).any():
            inputs["pixel_values"] = pixel_values
        return inputs


# ---- Baseline fusions ------------------------------------------------------------------------------------------------


def _grid(x, side):
    """Reshapes states [I, P, C] to [I, side, side, C], with zeros at the right and bottom."""
    grid = math.isqrt(x.shape[1])
    return F.pad(x.unflatten(1, (grid, grid)), (0, 0, 0, side - grid, 0, side - grid))


class BaselineFusion(nn.Module):
    """Base of fusions that map states [I, g, g, M·C], deepest tap first, to image tokens [I, g/k, g/k, D].

    Attributes:
      side: g, padded to a multiple of k.
    """

    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        vision, self.kernel = config.vision_config, config.stf_config["kernel"]
        self.side = math.ceil(vision.image_size // vision.patch_size / self.kernel) * self.kernel
        self.width, self.out = vision.hidden_size, config.text_config.hidden_size


class LDPv2(BaselineFusion):
    """MobileVLM V2's projector (arXiv 2402.03766)."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.mlp = _mlp(self.width, self.out)
        self.peg = nn.Conv2d(self.out, self.out, 3, padding=1, groups=self.out)

    def forward(self, x):
        x = F.avg_pool2d(self.mlp(x).permute(0, 3, 1, 2), self.kernel)
        return (x + self.peg(x)).permute(0, 2, 3, 1)


class CAbstractor(BaselineFusion):
    """Honeybee's C-Abstractor (arXiv 2312.06742)."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.position_embedding = nn.Parameter(torch.zeros(self.side**2, self.width))
        before, after = ([RegNetBlock(self.width) for _ in range(config.stf_config["depth"])] for _ in range(2))
        self.before, self.after = nn.Sequential(*before), nn.Sequential(*after)
        self.mlp = _mlp(self.width, self.out, nn.SiLU())

    def forward(self, x):
        x = (x + self.position_embedding.view(self.side, self.side, -1)).permute(0, 3, 1, 2)
        x = self.after(F.avg_pool2d(self.before(x), self.kernel))
        return self.mlp(x.permute(0, 2, 3, 1))


class RegNetBlock(nn.Module):
    """RegNet-Y's block with groups of one channel, layer norms and SiLU: [I, C, g, g] → [I, C, g, g]."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        squeezed = round(width / 4)
        self.squeeze, self.excite = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        y = F.silu(_over_channels(self.norm1, self.conv1(x)))
        y = F.silu(_over_channels(self.norm2, self.conv2(y)))
        y = y * self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return F.silu(x + _over_channels(self.norm3, self.conv3(y)))


class Resampler(BaselineFusion):
    """Honeybee's resampler (arXiv 2312.06742): trainable queries that attend to the patches."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.n = self.side // self.kernel
        self.side = config.vision_config.image_size // config.vision_config.patch_size  # not padded
        self.query_tokens = nn.Parameter(torch.zeros(self.n**2, self.width))
        self.input = nn.Linear(self.width, self.width)
        self.layers = nn.ModuleList(ResamplerLayer(self.width) for _ in range(config.stf_config["depth"]))
        self.output = nn.Linear(self.width, self.out)

    def forward(self, x):
        patches = self.input(x.flatten(1, 2))
        queries = self.query_tokens.expand(len(x), -1, -1)
        for layer in self.layers:
            queries = layer(queries, patches)
        return self.output(queries).unflatten(1, (self.n, self.n))


class ResamplerLayer(nn.Module):
    """A layer in which queries [I, N, C] attend to themselves and to patches [I, P, C]."""

    def __init__(self, width):
        super().__init__()
        self.query_norm, self.patch_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, 64)
        self.gate_proj, self.up_proj = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.hidden_norm = nn.LayerNorm(4 * width, eps=1e-6)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, queries, patches):
        queries = self.query_norm(queries)
        keys = torch.cat([queries, self.patch_norm(patches)], dim=1)
        x = queries + self.attention(queries, keys, keys)
        y = self.mlp_norm(x)
        return x + self.down_proj(self.hidden_norm(F.silu(self.gate_proj(y)) * self.up_proj(y)))


class TokenPacker(BaselineFusion):
    """TokenPacker (arXiv 2407.02392): a coarse query attends to the patches of its window, in all taps."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        tapped = len(config.stf_config["taps"]) * self.width
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key, self.value = _mlp(tapped, self.width), _mlp(tapped, self.width)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(self.width, eps=1e-6) for _ in range(3))
        self.attention = Attention(self.width, 128)
        self.mlp = _mlp(self.width, self.out)

    def forward(self, x):
        k, n, images = self.kernel, self.side // self.kernel, len(x)
        coarse = F.interpolate(x[..., : self.width].permute(0, 3, 1, 2).float(), size=(n, n), mode="bilinear")
        queries = self.query_norm(self.query(coarse.permute(0, 2, 3, 1).to(x.dtype)))

        def windows(y):
            return y.unfold(1, k, k).unfold(2, k, k).flatten(4).flatten(0, 2).transpose(1, 2)

        keys, values = self.key_norm(self.key(x)), self.value_norm(self.value(x))
        attended = self.attention(queries.flatten(0, 2)[:, None], windows(keys), windows(values))
        return self.mlp(attended.view(images, n, n, -1))


class Attention(nn.Module):
    """Attention of [I, T, C] to keys and values [I, S, C]; heads have gcd(C, ``size``) channels."""

    def __init__(self, width, size):
        super().__init__()
        self.size = math.gcd(width, size)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query, key, value):
        heads = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        heads = (x.unflatten(-1, (-1, self.size)).transpose(1, 2) for x in heads)
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def _mlp(width, out, activation=None):
    return nn.Sequential(nn.Linear(width, out), activation or nn.GELU(), nn.Linear(out, out))


def _over_channels(norm, x):
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


BASELINE_FUSIONS = {"ldp_v2": LDPv2, "c_abstractor": CAbstractor, "resampler": Resampler, "token_packer": TokenPacker}
