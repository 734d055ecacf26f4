"""The tokenizer that a GGUF file describes: what llama.cpp knows by names, spelled out. Needs no torch.

llama.cpp keeps vocabularies of two kinds for Llama, Mistral and Qwen models: SentencePiece's (``llama``), and
byte-level BPE (``gpt2``), whose way of splitting a text into words it names (``tokenizer.ggml.pre``).
"""

import pathlib
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stf_jax.data.sentencepieces import Kind, Vocabulary, build_tokenizer
from stf_jax.weights.gguf import open_reader

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
_WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("", "default", "gpt-2")
_DIGITS = ("smollm", "starcoder", "refact", "command-r")  # GPT-2's words, digits apart
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe")
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "megrez")
_WHOLE = (*_LLAMA3, "tekken")  # a word that is a token is not merged from its parts
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours → as the file names them
_LLAMA_IDS = {"bos": 1, "eos": 2, "unk": 0}  # of SentencePiece's where the file names none, as llama.cpp has them


def read_gguf_tokenizer(file: pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template where the file has one.

    Raises:
      ValueError: the file has none, or one of a kind that is not known here, or that contradicts itself.
    """
    prefix = "tokenizer."
    fields = open_reader(file, file.stat().st_mtime_ns).fields
    values = {key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)}
    kind, tokens = values.get("ggml.model"), values.get("ggml.tokens")
    if kind not in ("llama", "gpt2") or not tokens:
        raise ValueError(f"the file has a vocabulary of kind {kind!r}; known are 'llama' and 'gpt2'")
    is_llama, pre = kind == "llama", values.get("ggml.pre", "")
    kinds = values.get("ggml.token_type") or [Kind.NORMAL] * len(tokens)
    backend = _sentencepiece(values, tokens, kinds) if is_llama else _byte_level(values, tokens, kinds, pre)
    special: dict[str, Any] = {}
    for name, theirs in _SPECIAL.items():
        i = values.get(f"ggml.{theirs}_token_id", _LLAMA_IDS.get(name) if is_llama else None)
        if i is not None and not i < len(tokens):
            raise ValueError(f"the file names {i} as its {theirs} token, of {len(tokens)} tokens")
        special[f"{name}_token"] = None if i is None else tokens[i]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=values.get("ggml.add_bos_token", is_llama or pre in _LLAMA3),
        add_eos_token=values.get("ggml.add_eos_token", False),
        chat_template=values.get("chat_template"),
        **special,
    )


def _sentencepiece(values, tokens, kinds):
    scores = values.get("ggml.scores")
    if not scores or len(set(scores)) == 1:
        raise ValueError("the file's vocabulary has no scores, without which no text can be tokenised")
    return build_tokenizer(Vocabulary(tokens, scores, kinds), values.get("ggml.add_space_prefix", True))


def _byte_level(values, tokens, kinds, pre) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in values.get("ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE))
    backend.pre_tokenizer, backend.decoder = _splitter(pre), decoders.ByteLevel()
    if pre in _QWEN2:
        backend.normalizer = normalizers.NFC()
    for kind, special in ((Kind.CONTROL, True), (Kind.USER_DEFINED, False)):
        added = [token for token, its_kind in zip(tokens, kinds, strict=True) if its_kind == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in added]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return backend


def _splitter(pre):
    """How a text is split into words before merging."""
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = dict.fromkeys(_LLAMA3, _WORDS % "{1,3}") | dict.fromkeys(_QWEN2, _WORDS % "") | {"tekken": _TEKKEN}
    if pre not in patterns:
        raise ValueError(f"the file's vocabulary splits texts as {pre!r} does, which is not known here")
    split = pre_tokenizers.Split(Regex(patterns[pre]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
