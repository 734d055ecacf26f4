"""A language model of one's own: OLMo 2 (arXiv 2501.00656), with norms after each part, and over all heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from stf_jax.models.decoders import llama, transformer
from stf_jax.models.decoders.base import DecoderFamily, LLMConfig
from stf_jax.models.decoders.chat import SYSTEM_PLACEHOLDER, Chat, Mark, Text
from stf_jax.models.layers import RMSNorm, ones, parameter
from stf_jax.models.tensor_names import HEADS, VECTOR, Tensor


class HeadsNorm(nnx.Module):
    def __init__(self, rngs, config, heads, axis):
        self.eps = config.norm_eps
        axes = [(config.layers, "layers"), (heads, axis), (config.head_dim, "head_dim")]
        self.scale = parameter(rngs, axes, ones)

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((-2, -1), keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class Attention(transformer.Attention):
    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.query_norm = nnx.data(HeadsNorm(rngs, config, config.heads, "heads"))
        self.key_norm = nnx.data(HeadsNorm(rngs, config, config.kv_heads, "kv_heads"))


class Block(nnx.Module):
    def __init__(self, rngs, config):
        self.attention, self.mlp = Attention(rngs, config), transformer.MLP(rngs, config)
        self.attention_norm = RMSNorm(rngs, config.width, config.norm_eps, stack=config.layers)
        self.mlp_norm = RMSNorm(rngs, config.width, config.norm_eps, stack=config.layers)

    def __call__(self, x, cos, sin, attend):
        x = x + self.attention_norm(self.attention(x, cos, sin, attend))
        return x + self.mlp_norm(self.mlp(x))


class Decoder(transformer.Decoder):
    block = Block


LAYER = "model.layers.{layer}"
NAMES = llama.TENSOR_NAMES | {
    "blocks/attention_norm/scale": Tensor(f"{LAYER}.post_attention_layernorm.weight", VECTOR),
    "blocks/mlp_norm/scale": Tensor(f"{LAYER}.post_feedforward_layernorm.weight", VECTOR),
    "blocks/attention/query_norm/scale": Tensor(f"{LAYER}.self_attn.q_norm.weight", HEADS),
    "blocks/attention/key_norm/scale": Tensor(f"{LAYER}.self_attn.k_norm.weight", HEADS),
}
CHAT = Chat(
    start_with_system=(SYSTEM_PLACEHOLDER, Text("\nQ: ")),
    before_question=(Text("Q: "),),
    before_answer=(Text("\nA: "),),
    after_answer=(Mark.END,),
)
TINY = LLMConfig(512, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, family="olmo:OLMO")
OLMO = DecoderFamily(
    "olmo:Decoder",
    {"tiny": TINY},
    model_type="olmo2",
    fields=llama.FIELDS,
    tensor_names=NAMES,
    traits={},
    required=llama.REQUIRED,
)
