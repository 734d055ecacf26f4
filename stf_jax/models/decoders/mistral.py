"""Mistral (arXiv 2310.06825): Llama's computation. The sliding window of its first release is not applied."""

from stf_jax.models.decoders.base import DecoderFamily, LLMConfig
from stf_jax.models.decoders.chat import SYSTEM_PLACEHOLDER, Chat, Mark, Text
from stf_jax.models.decoders.llama import ASKS, FIELDS, IGNORED, MODULE, REQUIRED, TENSOR_NAMES

PRESETS = {
    # v0.2: without the sliding window of v0.1.
    "mistral-7b": LLMConfig(
        32_000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        rope_theta=1e6,
        family="mistral",
    ),
}
CHATS = {
    # The first Mistral-Instruct, in which the system text is prepended to the first question.
    "mistral": Chat(
        start_with_system=(Text("[INST] "), SYSTEM_PLACEHOLDER, Text("\n\n")),
        before_question=(Text("[INST] "),),
        before_answer=(Text(" [/INST]"),),
        answer_space=" ",
        after_answer=(Mark.END,),
        sign="[INST]",
    ),
}
COMPONENTS = {
    "mistral": DecoderFamily(
        MODULE,
        PRESETS,
        model_type="mistral",
        fields=FIELDS,
        tensor_names=TENSOR_NAMES,
        traits={"qkv_bias": False, "qk_norm": False},
        aliases=("llava_mistral",),
        asks=ASKS,
        required=REQUIRED,
        ignored=IGNORED,
        extra={"sliding_window": None},
        chats=CHATS,
    )
}
