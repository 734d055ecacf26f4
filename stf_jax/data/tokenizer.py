"""Loads tokenizers: any that transformers can read from a local folder, and the small ones of the miniatures."""

import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data import world_text
from stf_jax.data.records import IMAGE_MARK
from stf_jax.data.scenes import SHORT_ANSWER, make_caption, make_questions, make_scene
from stf_jax.data.sentencepieces import has_wrong_merges, read_sentencepiece
from stf_jax.files import local_copy, read_json
from stf_jax.models.decoders.llama import SYSTEM

MINIATURE = pathlib.Path(__file__).parent.parent / "weights" / "miniatures" / "tokenizer"
EMBEDDED = {"miniature": MINIATURE, "miniature/2": MINIATURE.parent / "2" / "tokenizer"}  # for the two editions
MINIATURE_VOCAB = 512
SENTENCEPIECE = "tokenizer.model"  # file name of Llama's and Vicuna's published vocabulary
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that use tokenizer.json unchanged
FILES = ("tokenizer.json", SENTENCEPIECE, "vocab.json")  # a folder with a tokenizer has one of them
BOS_IN_TEMPLATE = "bos_in_chat_template"  # key in an export's tokenizer_config.json: training texts start with BOS
_log = logging.getLogger(__name__)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a local folder, or one of :data:`EMBEDDED` by its name. Never downloads.

    Raises:
      UserError: the folder is missing or has no tokenizer, or the tokenizer has no offsets or no end of sequence.
    """
    folder = EMBEDDED.get(name) or (local_copy(name) if name else None)
    if folder is None or not folder.is_dir():
        problem = f"{name!r} is not a folder" if name else "no folder is given"
        raise UserError(
            f"The tokenizer is missing: {problem}. Provide one with --config.data.tokenizer=DIR, "
            "or try training on embedded data with --config=configs/demo.py."
        )
    try:
        tokenizer = read_tokenizer(folder)
    except Exception as error:  # tokenizers raises a bare Exception for a malformed file
        reason = (str(error) or repr(error)).splitlines()[0].strip(" :.")
        raise UserError(f"No tokenizer can be read from {folder}: {reason}.") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer in {folder} needs a tokenizer.json and an end-of-sequence token "
            "(eos_token in tokenizer_config.json)."
        )
    if has_wrong_merges(tokenizer, folder / SENTENCEPIECE):
        fix = _EXPORT_AGAIN if (folder / "processor_config.json").is_file() else _FIX
        _log.warning((_WRONG_MERGES + fix).format(folder=folder))
    return tokenizer


_WRONG_MERGES = (
    "The tokenizer.json in {folder} splits double spaces differently than SentencePiece, with which the model was "
    "trained: an earlier release or transformers 5 converted it. "
)
_FIX = (
    "To fix this, run: rm {folder}/tokenizer.json && cp SOURCE/tokenizer.model SOURCE/tokenizer_config.json {folder} "
    "(SOURCE is the folder that was imported). Finish runs that were started with the old file before you change it."
)
_EXPORT_AGAIN = "Fix the tokenizer of the exported model, then export it again."


def read_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerBase:
    """Reads a folder's tokenizer, without running any code in the folder.

    A folder with ``tokenizer.model`` but no ``tokenizer.json`` has Llama's format (also used by Vicuna and LLaVA); its
    ids are SentencePiece's. transformers reads all others.

    Raises:
      ValueError: the SentencePiece model is not supported, or a special token is missing or has another id than the
        files say.
      Exception: raised by transformers.
    """
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config, file = _read_dict(folder / "tokenizer_config.json"), folder / SENTENCEPIECE
    local |= _parse_token_objects(config)
    tokenizer: PreTrainedTokenizerBase
    if file.is_file() and not (folder / "tokenizer.json").is_file():
        tokenizer = read_sentencepiece(file, config, _read_dict(folder / "special_tokens_map.json"), local)
    elif config.get("tokenizer_class") in _GENERIC_CLASSES:  # does not read config.json, which may be of another type
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **local)
        if config.get(BOS_IN_TEMPLATE):
            tokenizer.add_bos_token = True
    else:
        from transformers import AutoTokenizer  # imports torch where it is installed: 3 s

        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    if config.get("legacy") is False:  # transformers reads it but does not save it
        tokenizer.init_kwargs["legacy"] = False
    _check_special_tokens(tokenizer, folder, config)
    return tokenizer


def _parse_token_objects(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns special tokens that ``tokenizer_config.json`` gives as objects without transformers' ``__type``."""
    found = {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, dict)}
    return {name: value["content"] for name, value in found.items() if "__type" not in value and "content" in value}


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Checks that special tokens have the ids that the files give; sets tokens with an empty name to None.

    transformers maps an empty name to the unknown token; if that is empty too, the lookup never ends. It also changes
    the ids of tokens that do not directly follow the previous ones.
    """
    empty = [name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if getattr(tokenizer, name, None) == ""]
    listed = _read_token_ids(folder, config)
    if "eos_token" in empty:
        known = ", ".join(map(str, tokenizer.added_tokens_decoder.values())) or "none"
        raise ValueError(
            f"it has an empty string as its {', '.join(empty)}; set them in tokenizer_config.json "
            f"(the vocabulary's special tokens are {known})"
        )
    for name in empty:
        setattr(tokenizer, name, None)
    vocabulary, eos = tokenizer.get_vocab(), tokenizer.eos_token
    if eos is not None and eos not in listed and vocabulary.get(eos, 0) >= tokenizer.vocab_size:
        raise ValueError(f"its eos_token {eos!r} is not in its vocabulary; correct it in tokenizer_config.json")
    wrong = [(token, i) for token, i in listed.items() if vocabulary.get(token) != i]
    if wrong:
        token, i = wrong[0]
        raise ValueError(
            f"its files give the special token {token!r} the id {i}, which leaves a gap after the other tokens' ids; "
            f"correct it, or add the missing tokens before it"
        )


def _read_token_ids(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Returns added tokens and their ids from the files of a folder."""
    added = _read_dict(folder / "tokenizer.json").get("added_tokens") or []
    found = {token["content"]: token["id"] for token in added}
    decoder = config.get("added_tokens_decoder") or {}
    found |= {token["content"]: int(i) for i, token in decoder.items()}
    return found | dict(_read_dict(folder / "added_tokens.json"))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, source: pathlib.Path, to: pathlib.Path) -> None:
    """Saves a tokenizer that was read from the folder ``source``, so that loading it gives the same tokenizer."""
    tokenizer.save_pretrained(to)
    if (source / SENTENCEPIECE).is_file():  # LLaVA's code reads it, but transformers no longer writes it
        shutil.copyfile(source / SENTENCEPIECE, to / SENTENCEPIECE)


def prefixes_only_start(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether text after a special token gets no SentencePiece space, only text at the start.

    This is how the slow tokenizer, which LLaVA uses, behaves with ``legacy: false`` in ``tokenizer_config.json``.
    """
    return tokenizer.init_kwargs.get("legacy") is False


def _read_dict(file: pathlib.Path) -> Mapping[str, Any]:
    values = read_json(file) if file.is_file() else {}
    return values if isinstance(values, dict) else {}


def max_positions(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns the maximum sequence length: the tokenizer's, or by default that of LLaVA-1.5 and Vicuna."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 2**24 else 4096


def untrained_tokens(tokenizer: PreTrainedTokenizerFast, vocab: int) -> tuple[int, ...]:
    """Returns the ids below ``vocab`` that no text contains: ``<image>`` and those beyond the tokenizer's."""
    mark = tokenizer.get_vocab().get(IMAGE_MARK, vocab)
    return tuple(sorted({*range(len(tokenizer), vocab), *range(mark, min(mark + 1, vocab))}))


def train_miniature_tokenizer(edition: int = 1) -> PreTrainedTokenizerFast:
    """Trains the miniatures' tokenizer: byte-level BPE with :data:`MINIATURE_VOCAB` tokens on text of training scenes.

    Models must read words that they never saw, so printed words are spelled out. In the first edition, the words are
    left out of the training text and so split into letters, or nearly; in the second, each letter and digit is a
    separate token. The result is deterministic.
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    isolate = pre_tokenizers.Split(Regex("USER|ASSISTANT|[A-Z0-9]"), behavior="isolated")
    tokenizer.pre_tokenizer = byte_level if edition == 1 else pre_tokenizers.Sequence([isolate, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MINIATURE_VOCAB if edition == 1 else MINIATURE_VOCAB - 8,  # leaves ids for added tokens
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_make_texts() if edition == 1 else _make_second_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def _make_second_texts() -> Iterator[str]:
    for index in range(4000):
        scene = world_text.make_scene(0, index)
        yield f"{SYSTEM} USER: \n{world_text.DESCRIBE} ASSISTANT: {world_text.make_caption(scene)}\n"
        for question in world_text.make_questions(scene, np.random.default_rng(index)):
            yield f"USER: {question.text}\n{SHORT_ANSWER} ASSISTANT: {question.answer}"


def _make_texts() -> Iterator[str]:
    for index in range(2000):
        scene = make_scene(0, index)
        yield f"{SYSTEM} USER: \nDescribe the picture. ASSISTANT: "
        yield make_caption(scene).replace(scene.word, "") if scene.word else make_caption(scene)
        for question in make_questions(scene, np.random.default_rng(index)):
            if question.kind != "reading":
                yield f"USER: {question.text}\n{SHORT_ANSWER} ASSISTANT: {question.answer}"
            else:
                yield f" {question.text} ASSISTANT:"
