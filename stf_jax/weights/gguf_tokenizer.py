"""Builds the tokenizer that a GGUF file describes, without torch.

llama.cpp has two kinds of vocabularies for Llama, Mistral and Qwen models: SentencePiece's (``llama``), and byte-level
BPE (``gpt2``). It refers to the pre-tokenizer of the latter by name (``tokenizer.ggml.pre``).
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stf_jax.data.sentencepieces import Kind, Vocabulary, build_tokenizer
from stf_jax.weights.gguf import cached_reader

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
_WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("", "default", "gpt-2")
_DIGITS = ("smollm", "starcoder", "refact", "command-r")  # GPT-2's words, with separate digits
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe")
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "megrez")
_IGNORE_MERGES = (*_LLAMA3, "tekken")  # words in the vocabulary become tokens without merging
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # name in transformers → name in the file
_LLAMA_IDS = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's defaults for SentencePiece


def read_gguf_tokenizer(file: pathlib.Path) -> PreTrainedTokenizerFast:
    """Reads the tokenizer, with its chat template if the file has one.

    Raises:
      ValueError: the file has no tokenizer, one of an unsupported kind, or an inconsistent one.
    """
    prefix = "tokenizer."
    fields = cached_reader(file, file.stat().st_mtime_ns).fields
    values = {key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)}
    kind, tokens = values.get("ggml.model"), values.get("ggml.tokens")
    if kind not in ("llama", "gpt2") or not tokens:
        raise ValueError(f"the file has a vocabulary of kind {kind!r}; supported: 'llama', 'gpt2'")
    is_llama, pre = kind == "llama", values.get("ggml.pre", "")
    kinds = values.get("ggml.token_type") or [Kind.NORMAL] * len(tokens)
    backend = _build_sentencepiece(values, tokens, kinds) if is_llama else _build_byte_level(values, tokens, kinds, pre)
    special: dict[str, Any] = {}
    for name, gguf_name in _SPECIAL.items():
        i = values.get(f"ggml.{gguf_name}_token_id", _LLAMA_IDS.get(name) if is_llama else None)
        if i is not None and not i < len(tokens):
            raise ValueError(f"the id of the file's {gguf_name} token is {i}, but it has {len(tokens)} tokens")
        special[f"{name}_token"] = None if i is None else tokens[i]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=values.get("ggml.add_bos_token", is_llama or pre in _LLAMA3),
        add_eos_token=values.get("ggml.add_eos_token", False),
        chat_template=values.get("chat_template"),
        **special,
    )


def _build_sentencepiece(values: Mapping[str, Any], tokens: list[str], kinds: Sequence[int]) -> Tokenizer:
    scores = values.get("ggml.scores")
    if not scores or len(set(scores)) == 1:
        raise ValueError("the file's vocabulary has no scores, which are needed to tokenize")
    return build_tokenizer(Vocabulary(tokens, scores, kinds), values.get("ggml.add_space_prefix", True))


def _build_byte_level(values: Mapping[str, Any], tokens: list[str], kinds: Sequence[int], pre: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in values.get("ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _IGNORE_MERGES))
    backend.pre_tokenizer, backend.decoder = _make_pre_tokenizer(pre), decoders.ByteLevel()
    if pre in _QWEN2:
        backend.normalizer = normalizers.NFC()
    for kind, special in ((Kind.CONTROL, True), (Kind.USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, token_kind in zip(tokens, kinds, strict=True)
            if token_kind == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return backend


def _make_pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer, which splits a text into words before merging."""
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = dict.fromkeys(_LLAMA3, _WORDS % "{1,3}") | dict.fromkeys(_QWEN2, _WORDS % "") | {"tekken": _TEKKEN}
    if pre not in patterns:
        raise ValueError(f"the file's vocabulary has the pre-tokenizer {pre!r}, which is not supported")
    split = pre_tokenizers.Split(Regex(patterns[pre]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
