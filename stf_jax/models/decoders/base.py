"""What a family of language models is: the models of one architecture, their names, config and chat templates.

A family is a :class:`DecoderFamily` in a file of this folder, or in your own. A config names one of its shapes:
``model.llm=vicuna-7b``, or ``model.llm=mylab.olmo:SMALL`` for an :class:`LLMConfig` of your own, whose ``family`` is
``mylab.olmo:OLMO``.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stf_jax.models.decoders.chat import Chat
from stf_jax.models.tensor_names import TensorNames
from stf_jax.registry import Registry, load_object

if TYPE_CHECKING:  # importing it takes a second, and the families' files are read by programs that build no model
    from stf_jax.models.decoders.transformer import Decoder


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies to texts longer than those of pretraining."""

    kind: str  # linear: all by factor | llama3: low frequencies by factor, high ones unchanged, a ramp between
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192  # positions


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Shape of a decoder."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    family: str = "llama"  # a name in DECODERS, or package.module:FAMILY


@dataclasses.dataclass(frozen=True)
class DecoderFamily:
    """All that is particular to one family of language models.

    Attributes:
      module: ``package.module:Class``, called as :class:`stf_jax.models.decoders.transformer.Decoder` is.
      presets: published shapes by name.
      model_type: transformers' name of the architecture.
      fields: attribute of :class:`LLMConfig` → key of transformers' config.
      tensor_names: transformers' name and layout of each parameter.
      traits: attributes that are the same in the whole family.
      asks: attribute → key of transformers' config that may turn it on nevertheless.
      aliases: ``model_type`` of LLaVA's own checkpoints with such a language model.
      required: keys of transformers' config, and the only value that the module computes.
      ignored: keys of transformers' config that the module does not compute, and the note where a checkpoint has one.
      extra: further keys of transformers' config, for exports.
      length: key of transformers' config for the number of positions.
      gguf: llama.cpp's name of the architecture; empty if its files are not read.
      chats: chat templates by name, for ``data.template``.
      config: the class of the shapes, if they have more attributes than :class:`LLMConfig`.
    """

    module: str
    presets: Mapping[str, LLMConfig]
    model_type: str
    fields: Mapping[str, str]
    tensor_names: TensorNames
    traits: Mapping[str, bool]
    asks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    length: str = "max_position_embeddings"
    gguf: str = ""
    chats: Mapping[str, Chat] = dataclasses.field(default_factory=dict)
    config: type[LLMConfig] = LLMConfig

    @property
    def root(self) -> str:
        """What the names of all tensors but the head's begin with, ``model.`` in most families."""
        return self.tensor_names["embedding"].name.partition(".")[0] + "."


DECODERS: Registry[DecoderFamily] = Registry("family of language models", "stf_jax.models.decoders")


def find_decoder_class(config: LLMConfig) -> "type[Decoder]":
    """The class that computes a language model. Raises UserError for an unknown family."""
    return load_object(DECODERS.find(config.family).module, "language model")
