"""Qwen3 (arXiv 2505.09388): Llama's computation with norms on query and key heads. Its chat template is Qwen2's."""

import functools

from stf_jax.models.decoders.base import DecoderFamily, LLMConfig
from stf_jax.models.decoders.llama import ASKS, FIELDS, IGNORED, MODULE, REQUIRED, TENSOR_NAMES

_qwen3 = functools.partial(
    LLMConfig, 151_936, head_dim=128, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, family="qwen3"
)
PRESETS = {
    "qwen3-0.6b": _qwen3(width=1024, layers=28, heads=16, kv_heads=8, mlp=3072, tied=True),
    "qwen3-8b": _qwen3(width=4096, layers=36, heads=32, kv_heads=8, mlp=12_288),
}
COMPONENTS = {
    "qwen3": DecoderFamily(
        MODULE,
        PRESETS,
        model_type="qwen3",
        fields=FIELDS,
        tensor_names=TENSOR_NAMES,
        traits={"qkv_bias": False, "qk_norm": True},
        asks=ASKS,
        required=REQUIRED,
        ignored=IGNORED,
        gguf="qwen3",
    )
}
