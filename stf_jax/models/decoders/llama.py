"""Llama, and what computes the same under its name: Vicuna, SmolLM2 (arXiv 2302.13971, 2307.09288, 2407.21783)."""

import functools

from stf_jax.models.decoders.base import DecoderFamily, LLMConfig
from stf_jax.models.decoders.chat import SYSTEM_PLACEHOLDER, Chat, Control, Mark, Text
from stf_jax.models.tensor_names import FROM_HEADS, HEADS, LINEAR, MATRIX, TO_HEADS, VECTOR, Tensor, TensorNames

MODULE = "stf_jax.models.decoders.transformer:Decoder"
FIELDS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
REQUIRED = {"hidden_act": "silu"}
IGNORED = {
    "mlp_bias": "The config says mlp_bias, but the tensors have none.",
    "sliding_window": "The sliding window of {} positions is not applied: only texts up to that length are exact.",
}
ASKS = {"qkv_bias": "attention_bias"}
TENSOR_NAMES: TensorNames = {
    "embedding": Tensor("model.embed_tokens.weight", MATRIX),
    "blocks/attention_norm/scale": Tensor("model.layers.{layer}.input_layernorm.weight", VECTOR),
    "blocks/attention/query/kernel": Tensor("model.layers.{layer}.self_attn.q_proj.weight", TO_HEADS),
    "blocks/attention/query/bias": Tensor("model.layers.{layer}.self_attn.q_proj.bias", HEADS),
    "blocks/attention/key/kernel": Tensor("model.layers.{layer}.self_attn.k_proj.weight", TO_HEADS),
    "blocks/attention/key/bias": Tensor("model.layers.{layer}.self_attn.k_proj.bias", HEADS),
    "blocks/attention/value/kernel": Tensor("model.layers.{layer}.self_attn.v_proj.weight", TO_HEADS),
    "blocks/attention/value/bias": Tensor("model.layers.{layer}.self_attn.v_proj.bias", HEADS),
    "blocks/attention/query_norm/scale": Tensor("model.layers.{layer}.self_attn.q_norm.weight", VECTOR),
    "blocks/attention/key_norm/scale": Tensor("model.layers.{layer}.self_attn.k_norm.weight", VECTOR),
    "blocks/attention/out/kernel": Tensor("model.layers.{layer}.self_attn.o_proj.weight", FROM_HEADS),
    "blocks/mlp_norm/scale": Tensor("model.layers.{layer}.post_attention_layernorm.weight", VECTOR),
    "blocks/mlp/gate/kernel": Tensor("model.layers.{layer}.mlp.gate_proj.weight", LINEAR),
    "blocks/mlp/up/kernel": Tensor("model.layers.{layer}.mlp.up_proj.weight", LINEAR),
    "blocks/mlp/down/kernel": Tensor("model.layers.{layer}.mlp.down_proj.weight", LINEAR),
    "norm/scale": Tensor("model.norm.weight", VECTOR),
    "head/kernel": Tensor("lm_head.weight", LINEAR),
}

_llama = functools.partial(LLMConfig, family="llama")
_smol = functools.partial(_llama, 49_152, head_dim=64, tied=True)
_mini = functools.partial(_llama, 512, width=128, heads=4, kv_heads=2, head_dim=32, tied=True)
PRESETS = {
    "vicuna-7b": _llama(32_000, width=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp=11_008),
    "vicuna-13b": _llama(32_000, width=5120, layers=40, heads=40, kv_heads=40, head_dim=128, mlp=13_824),
    "llama-3-8b": _llama(
        128_256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14_336, rope_theta=5e5
    ),
    "smollm2-135m": _smol(width=576, layers=30, heads=9, kv_heads=3, mlp=1536, rope_theta=1e5),
    "smollm2-360m": _smol(width=960, layers=32, heads=15, kv_heads=5, mlp=2560, rope_theta=1e5),
    "smollm2-1.7b": _smol(width=2048, layers=24, heads=32, kv_heads=32, mlp=8192, rope_theta=1.3e5),
    # The demo's (stf_jax/weights/miniatures).
    "llama-mini": _mini(layers=4, mlp=256),
    "llama-mini-6": _mini(layers=6, mlp=512),
}

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)  # Vicuna's system prompt, with which its weights and LLaVA-1.5's were trained
_HEADER, _HEADER_END, _EOT = Control("<|start_header_id|>"), Control("<|end_header_id|>"), Control("<|eot_id|>")
CHATS = {
    # Vicuna, LLaVA's `v1`: SYSTEM USER: … ASSISTANT: …</s>USER: …
    "v1": Chat(
        start=(Text(SYSTEM + " "),),
        start_with_system=(SYSTEM_PLACEHOLDER, Text(" USER: ")),
        before_question=(Text("USER: "),),
        before_answer=(Text(" ASSISTANT:"),),
        answer_space=" ",
        after_answer=(Mark.END,),
    ),
    # Llama 3.
    "llama-3": Chat(
        start_with_system=(
            *(_HEADER, Text("system"), _HEADER_END, Text("\n\n"), SYSTEM_PLACEHOLDER, _EOT),
            *(_HEADER, Text("user"), _HEADER_END, Text("\n\n")),
        ),
        before_question=(_HEADER, Text("user"), _HEADER_END, Text("\n\n")),
        before_answer=(_EOT, _HEADER, Text("assistant"), _HEADER_END, Text("\n\n")),
        after_answer=(Control("<|eot_id|>", is_target=True),),
    ),
}
COMPONENTS = {
    "llama": DecoderFamily(
        MODULE,
        PRESETS,
        model_type="llama",
        fields=FIELDS,
        tensor_names=TENSOR_NAMES,
        traits={"qkv_bias": False, "qk_norm": False},
        aliases=("llava_llama", "llava"),
        asks=ASKS,
        required=REQUIRED,
        ignored=IGNORED,
        gguf="llama",
        chats=CHATS,
    )
}
