"""Texts that tokenizers find hard, and small SentencePiece models."""

import pathlib
import random

import sentencepiece

from stf_jax.data.conversation import SYSTEM

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}

ATOMS = (
    *(" ", "  ", "    ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2581", "\x00", "\x7f", "\ufffd"),
    *("a", "aa", "b", "the", "ing", "USER:", " ASSISTANT:", "<image>", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]"),
    *("def f():", "return", "{", "}", "==", "//", "#", "\\", "1", "23", "'s", "Straße", "\u6f22\u5b57", "日本語"),
    *("привет", "العربية", "हिन्दी", "🤗", "👩\u200d👩\u200d👧", "e\u0301", "\u0300", "n\u0303\u0323"),
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of words, code and signs of many scripts, with runs of spaces and of any of them."""
    draw = random.Random(seed)

    def part():
        if draw.random() < 0.2:
            return " " * draw.randrange(40)
        return draw.choice(ATOMS) * draw.choice((1, 1, 1, 2, 5))

    return ["".join(part() for _ in range(draw.randrange(12))) for _ in range(count)]


def train_sentencepiece(folder: pathlib.Path, **options) -> sentencepiece.SentencePieceProcessor:
    """A small model of that kind: ``tokenizer.model`` in the folder."""
    corpus = folder / "corpus.txt"
    corpus.write_text(f"{SYSTEM} USER: What is this? ASSISTANT: a cat and  a dog.\n日本語 Straße ﬁne\n" * 20)
    options = {"model_type": "bpe", "vocab_size": 400, "hard_vocab_limit": False, "byte_fallback": True} | options
    to = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(to), minloglevel=2, **options)
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
