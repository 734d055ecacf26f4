"""Reads SentencePiece BPE vocabularies (Llama, Vicuna, Mistral) into tokenizers with exactly SentencePiece's ids.

transformers 5 reads them too, but orders merges by token id, while SentencePiece orders them by score. Llama's pieces
of spaces have low ids but the lowest scores, so transformers gives different tokens wherever two spaces meet.
"""

import dataclasses
import enum
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"  # SentencePiece's symbol for a space
_BPE = 2  # TrainerSpec.model_type
# The first pieces after the bytes in Llama's and Mistral's vocabularies. Spaces come first, with the lowest scores.
_FIRST_ID = 259
_FIRST_PIECES = ((2 * SPACE, f"{SPACE}t", "er", "in"), (2 * SPACE, 4 * SPACE, f"{SPACE}t", "in"))
# Spaces between words, in code, and in runs longer than any piece; then text that few vocabularies have as one piece.
_PROBE = (
    "USER: What is it?\n A \u00fc.  b\ndef f():\n    return 1\t\t2\n"
    + "".join("x" + " " * count for count in range(40))
    + "\u6f22\u5b57\u3000\U0001f917 e\u0301"
)


class Kind(enum.IntEnum):
    """The type of a piece, as numbered by SentencePiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The pieces in the order of their ids, with their scores and :class:`Kind`."""

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]


def build_tokenizer(vocabulary: Vocabulary, prefix: bool = True, charsmap: bytes = b"") -> Tokenizer:
    """Builds a tokenizer with SentencePiece's ids, which adds no tokens before or after a text.

    Args:
      prefix: put a space before each text, and before text that follows a special token.
      charsmap: SentencePiece's compiled normalization.
    """
    kinds = list(zip(vocabulary.pieces, vocabulary.kinds, strict=True))
    bpe = models.BPE(
        {piece: i for i, piece in enumerate(vocabulary.pieces)},
        _make_merges(vocabulary),
        unk_token=next((piece for piece, kind in kinds if kind == Kind.UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=any(kind == Kind.BYTE for _, kind in kinds),
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Precompiled(charsmap)] if charsmap else [])
        + [normalizers.Prepend(SPACE)] * prefix
        + [normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * prefix
    )
    special = [piece for piece, kind in kinds if kind in (Kind.UNKNOWN, Kind.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    symbols = [piece for piece, kind in kinds if kind == Kind.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in symbols])
    return tokenizer


def _make_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Returns all pairs that make a piece, the piece with the highest score first.

    If scores are equal, as those of Llama's runs of spaces are, SentencePiece merges the leftmost pair. In a run of
    spaces that is the pair with the longest left half, so longer left halves go first.
    """
    rows = zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds, strict=True)
    scores = {piece: score for piece, score, kind in rows if kind == Kind.NORMAL}
    pairs = [
        (-score, -cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    pairs.sort(key=lambda pair: pair[:2])
    return [(piece[:-cut], piece[-cut:]) for _, cut, piece in pairs]


def read_sentencepiece(
    file: pathlib.Path, config: Mapping[str, Any], names: Mapping[str, Any], options: Mapping[str, Any]
) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a SentencePiece model, with the config files of transformers next to it.

    Args:
      config, names: contents of ``tokenizer_config.json`` and ``special_tokens_map.json``. Special tokens that neither
        of them names are the model's; a text starts with BOS unless ``add_bos_token`` is false, as for Llama.
      options: for transformers' ``from_pretrained``.

    Raises:
      ValueError: the model is not BPE, or its normalization is not supported, so that ids would differ.
    """
    model = _parse(file)
    if model.trainer_spec.model_type != _BPE:
        raise ValueError(f"{file.name} is a SentencePiece model that is not BPE")
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    own = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    values: dict[str, Any] = {
        name: model.pieces[i].piece
        for name, i in own.items()
        if i >= 0 and config.get(name) is None and names.get(name) is None
    }
    values["add_bos_token"] = config.get("add_bos_token") is not False
    values["add_eos_token"] = config.get("add_eos_token") is True
    backend = build_tokenizer(_vocabulary(model), normalizer.add_dummy_prefix, normalizer.precompiled_charsmap)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as json_file:
        json_file.write(backend.to_str())
        json_file.flush()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            file.parent, tokenizer_file=json_file.name, **{**values, **options}
        )
    if not _matches_sentencepiece(tokenizer, file):
        raise ValueError(f"{file.name} needs features of SentencePiece that are not supported")
    return tokenizer


def has_wrong_merges(tokenizer: PreTrainedTokenizerFast, file: pathlib.Path) -> bool:
    """Whether a tokenizer has the pieces of a SentencePiece model but encodes text differently.

    This is the case if transformers 5 converted it. Without the model's file, only Llama's and Mistral's are detected.
    """
    if not file.is_file():
        first = tuple(tokenizer.convert_ids_to_tokens(list(range(_FIRST_ID, _FIRST_ID + 4))))
        return first in _FIRST_PIECES and tokenizer.tokenize("a  b")[1:2] == [2 * SPACE]
    try:
        pieces = _parse(file).pieces
    except ValueError:  # Llama 3's file of that name has another format
        return False
    vocabulary = tokenizer.get_vocab()
    same = all(vocabulary.get(piece.piece) == i for i, piece in enumerate(pieces) if piece.type == Kind.NORMAL)
    return same and not _matches_sentencepiece(tokenizer, file)


def _matches_sentencepiece(tokenizer: PreTrainedTokenizerFast, file: pathlib.Path) -> bool:
    import sentencepiece  # only needed here

    expected = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(_PROBE)
    return tokenizer(_PROBE, add_special_tokens=False).input_ids == expected


def _parse(file: pathlib.Path) -> Any:
    """Returns the model in a file, a protobuf message. Raises ValueError if there is none."""
    from sentencepiece import sentencepiece_model_pb2  # only needed here

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf adds it on import
    try:
        model.ParseFromString(file.read_bytes())
    except Exception:  # protobuf raises two types of its own
        model.Clear()
    if not model.pieces:
        raise ValueError(f"{file.name} is not a SentencePiece model")
    return model


def _vocabulary(model: Any) -> Vocabulary:
    pieces = model.pieces
    return Vocabulary([p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces])
