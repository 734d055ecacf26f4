"""Texts that are hard for tokenizers, and small SentencePiece models."""

import pathlib
import random

import sentencepiece

from stf_jax.models.decoders.llama import SYSTEM

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}

ATOMS = (
    *(" ", "  ", "    ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2581", "\x00", "\x7f", "\ufffd"),
    *("a", "aa", "b", "the", "ing", "USER:", " ASSISTANT:", "<image>", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]"),
    *("def f():", "return", "{", "}", "==", "//", "#", "\\", "1", "23", "'s", "Straße", "\u6f22\u5b57", "日本語"),
    *("привет", "العربية", "हिन्दी", "🤗", "👩\u200d👩\u200d👧", "e\u0301", "\u0300", "n\u0303\u0323"),
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Makes texts of words, code and characters of many scripts, with runs of spaces and other repetitions."""
    rng = random.Random(seed)

    def make_part():
        if rng.random() < 0.2:
            return " " * rng.randrange(40)
        return rng.choice(ATOMS) * rng.choice((1, 1, 1, 2, 5))

    return ["".join(make_part() for _ in range(rng.randrange(12))) for _ in range(count)]


def train_sentencepiece(folder: pathlib.Path, **options) -> sentencepiece.SentencePieceProcessor:
    """Trains a small SentencePiece model and saves it as ``tokenizer.model`` in the folder."""
    corpus = folder / "corpus.txt"
    corpus.write_text(f"{SYSTEM} USER: What is this? ASSISTANT: a cat and  a dog.\n日本語 Straße ﬁne\n" * 20)
    options = {"model_type": "bpe", "vocab_size": 400, "hard_vocab_limit": False, "byte_fallback": True} | options
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(prefix), minloglevel=2, **options)
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
