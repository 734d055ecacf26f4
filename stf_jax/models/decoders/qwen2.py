"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama's computation with biases on query, key and value."""

import functools

from stf_jax.models.decoders.base import DecoderFamily, LLMConfig
from stf_jax.models.decoders.chat import SYSTEM_PLACEHOLDER, Chat, Control, Text
from stf_jax.models.decoders.llama import ASKS, FIELDS, IGNORED, MODULE, REQUIRED, TENSOR_NAMES

_qwen2 = functools.partial(LLMConfig, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, family="qwen2")
PRESETS = {
    "qwen2.5-0.5b": _qwen2(151_936, width=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864, tied=True),
    "qwen2.5-7b": _qwen2(152_064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp=18_944),
}
_TURN, _TURN_END = Control("<|im_start|>"), Control("<|im_end|>")
CHATS = {
    # Qwen and SmolLM2.
    "chatml": Chat(
        start=(_TURN, Text("system\nYou are a helpful assistant."), _TURN_END, Text("\n")),
        start_with_system=(_TURN, Text("system\n"), SYSTEM_PLACEHOLDER, _TURN_END, Text("\n"), _TURN, Text("user\n")),
        before_question=(_TURN, Text("user\n")),
        before_answer=(_TURN_END, Text("\n"), _TURN, Text("assistant\n")),
        after_answer=(Control("<|im_end|>", is_target=True), Text("\n")),
    ),
}
COMPONENTS = {
    "qwen2": DecoderFamily(
        MODULE,
        PRESETS,
        model_type="qwen2",
        fields=FIELDS,
        tensor_names=TENSOR_NAMES,
        traits={"qkv_bias": True, "qk_norm": False},
        aliases=("llava_qwen",),
        asks=ASKS,
        required=REQUIRED,
        ignored=IGNORED,
        gguf="qwen2",
        chats=CHATS,
    )
}
