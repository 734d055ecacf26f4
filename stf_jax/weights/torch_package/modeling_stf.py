"""LLaVA-STF (arXiv 2506.07138) in PyTorch: a vision tower read through taps, MBTF, STF, and a language model.

In the place of MBTF and STF may stand what they are compared with; the larger of these are classes at the end of this
file. Tower and language model are transformers' own. Axis letters: B rows, I images, T positions, P patches (a grid
of g×g), N image tokens per image, C tower width, M taps, D language model width, k patches a side of a window.
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
    """What both models below declare to transformers."""

    config_class = LlavaSTFConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 (its names before and since 5.24)
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
        if fusion["fusion"] in RIVALS:
            self.mm_projector = RIVALS[fusion["fusion"]](config)
        else:
            self.mm_projector = self._projector(fusion, width, out)
        self.post_init()

    def _projector(self, fusion, width, out):
        """Linear layers over what a window holds."""
        paper = fusion["variant"] == "paper"
        window = width if fusion["fusion"] == "avg_pool" else self.kernel**2 * width
        if not fusion["fusion"].endswith("stf"):
            sizes = [window, out, out]
        elif paper:
            sizes = [window, window, fusion["stf_hidden"], out]
        else:
            sizes = [window, fusion["stf_hidden"], out]
        layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
        ends_in_gelu = paper and fusion["fusion"].endswith("stf")
        return nn.Sequential(*(layers if ends_in_gelu else layers[:-1]))

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Image tokens of normalised images [I, 3, H, W], as transformers 5 defines this method.

        Args:
          kwargs: go to the vision tower. ``return_dict=False`` gives a tuple.

        Returns:
          ``pooler_output``: the image tokens [I, N, D], row by row; the tower's ``last_hidden_state`` and
          ``hidden_states`` beside it.
        """
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        outputs = self.vision_tower(pixel_values.to(self.dtype), **kwargs)
        states = outputs.hidden_states
        x = torch.cat([states[tap][:, int(self.class_token) :] for tap in self.config.stf_config["taps"]], dim=-1)
        x = self.mm_projector_crosslayer(x)
        if self.config.stf_config["fusion"] in RIVALS:
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
        """The values of each k×k window [I, N, …] of states [I, P, C]."""
        fusion, k = self.config.stf_config["fusion"], self.kernel
        if k == 1:
            return x
        n = math.ceil(math.isqrt(x.shape[1]) / k)
        x = _grid(x, n * k).unflatten(2, (n, k)).unflatten(1, (n, k)).transpose(2, 3)
        if fusion == "avg_pool":
            x = x.mean((3, 4))
        elif fusion == "pixel_shuffle":  # patch by patch
            x = x.flatten(3)
        else:  # channel by channel, as the authors' layers read it
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
        """Reads text with image tokens in the places of ``<image>``.

        Args:
          input_ids: [B, T]; ``config.image_token_id`` stands N times for each image. Or ``inputs_embeds`` [B, T, D],
            in which image tokens have taken their places already.
          pixel_values: [I, 3, H, W], images in the order in which the rows name them.
          kwargs: go to the language model, and so to its attention: also its cache, whose name differs between
            releases. ``return_dict=False`` gives a tuple.

        Raises:
          ValueError: images and places do not match, or not one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            is_image = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            if pixel_values is not None:
                tokens = self.get_image_features(pixel_values, return_dict=True).pooler_output.flatten(0, 1)
                if int(is_image.sum()) != len(tokens):
                    raise ValueError(f"The text has {int(is_image.sum())} places for {len(tokens)} image tokens.")
                tokens = tokens.to(inputs_embeds.device, inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], tokens)
            elif is_image.any():
                raise ValueError("The text names images, but there are no pixel_values.")
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
        """As :meth:`LlavaSTFModel.get_image_features`."""
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
        """Logits [B, T, V], or of the last ``logits_to_keep`` positions.

        With ``labels`` [B, T] (−100 where nothing is learned) also the mean next-token loss. Otherwise as
        :meth:`LlavaSTFModel.forward`.
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
        """Repeats each row with its own images, for beams: rows a, a, b, b take images of a, of a, of b, of b."""
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
        """Images enter with the positions that name them; with a cache these are read once."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        read = inputs.get("input_ids")
        if read is not None and (read == self.config.image_token_id).any():
            inputs["pixel_values"] = pixel_values
        return inputs


# ---- What MBTF and STF are compared with -----------------------------------------------------------------------------


def _grid(x, side):
    """States [I, P, C] as [I, side, side, C], with zeros at the right and bottom."""
    grid = math.isqrt(x.shape[1])
    return F.pad(x.unflatten(1, (grid, grid)), (0, 0, 0, side - grid, 0, side - grid))


class Rival(nn.Module):
    """Makes image tokens [I, g/k, g/k, D] of states [I, g, g, M·C], the deepest tap's channels first.

    Attributes:
      side: g, with room for whole windows.
    """

    def __init__(self, config: LlavaSTFConfig):
        super().__init__()
        vision, self.kernel = config.vision_config, config.stf_config["kernel"]
        self.side = math.ceil(vision.image_size // vision.patch_size / self.kernel) * self.kernel
        self.width, self.out = vision.hidden_size, config.text_config.hidden_size


class LDPv2(Rival):
    """MobileVLM V2's projector (arXiv 2402.03766)."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.mlp = _mlp(self.width, self.out)
        self.peg = nn.Conv2d(self.out, self.out, 3, padding=1, groups=self.out)

    def forward(self, x):
        x = F.avg_pool2d(self.mlp(x).permute(0, 3, 1, 2), self.kernel)
        return (x + self.peg(x)).permute(0, 2, 3, 1)


class CAbstractor(Rival):
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


class Resampler(Rival):
    """Learned queries that look at the patches: the resampler of Honeybee (arXiv 2312.06742)."""

    def __init__(self, config: LlavaSTFConfig):
        super().__init__(config)
        self.n = self.side // self.kernel
        self.side = config.vision_config.image_size // config.vision_config.patch_size  # without windows
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
    """Queries [I, N, C] look at themselves and at patches [I, P, C]."""

    def __init__(self, width):
        super().__init__()
        self.query_norm, self.patch_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, 64)
        self.gate_proj, self.up_proj = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.hidden_norm = nn.LayerNorm(4 * width, eps=1e-6)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, queries, patches):
        queries = self.query_norm(queries)
        seen = torch.cat([queries, self.patch_norm(patches)], dim=1)
        x = queries + self.attention(queries, seen, seen)
        y = self.mlp_norm(x)
        return x + self.down_proj(self.hidden_norm(F.silu(self.gate_proj(y)) * self.up_proj(y)))


class TokenPacker(Rival):
    """TokenPacker (arXiv 2407.02392): a coarse query looks at the patches of its window, in all taps."""

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
        found = self.attention(queries.flatten(0, 2)[:, None], windows(keys), windows(values))
        return self.mlp(found.view(images, n, n, -1))


class Attention(nn.Module):
    """Of [I, T, C] to keys and values [I, S, C], by heads of ``size`` channels, or as many as divide that and C."""

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


RIVALS = {"ldp_v2": LDPv2, "c_abstractor": CAbstractor, "resampler": Resampler, "token_packer": TokenPacker}
