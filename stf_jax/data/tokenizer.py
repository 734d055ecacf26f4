"""Tokenizers: any that transformers reads from a local folder, and the small one of the miniatures."""

import logging
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data import world_text
from stf_jax.data.records import IMAGE_MARK
from stf_jax.data.scenes import SHORT_ANSWER, caption, make_scene, questions
from stf_jax.data.sentencepieces import has_wrong_merges, read_sentencepiece
from stf_jax.runtime.files import fetched, read_json

MINIATURE = pathlib.Path(__file__).parent.parent / "weights" / "miniatures" / "tokenizer"
EMBEDDED = {"miniature": MINIATURE, "miniature/2": MINIATURE.parent / "2" / "tokenizer"}  # by edition of the world
MINIATURE_VOCAB = 512
SENTENCEPIECE = "tokenizer.model"  # Llama's and Vicuna's vocabulary, as they publish it
_AS_WRITTEN = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take tokenizer.json as it stands
FILES = ("tokenizer.json", SENTENCEPIECE, "vocab.json")  # one of which a folder with a tokenizer holds
BOS_IN_TEMPLATE = "bos_in_chat_template"  # an export's tokenizer_config.json: texts began with BOS in training
_log = logging.getLogger(__name__)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Reads a tokenizer from a local folder, or one of :data:`EMBEDDED` by its name. Never downloads.

    Raises:
      UserError: no such folder, no tokenizer in it, or one that cannot tell which characters a token covers.
    """
    folder = EMBEDDED.get(name) or (fetched(name) if name else None)
    if folder is None or not folder.is_dir():
        where = f"{name!r} is no folder" if name else "no folder is given"
        raise UserError(
            f"The tokenizer is missing: {where}. Provide one with --config.data.tokenizer=DIR, "
            "or see training work on embedded data with --config=configs/demo.py."
        )
    try:
        tokenizer = read_tokenizer(folder)
    except Exception as error:  # tokenizers raises just that for a file of another form
        reason = (str(error) or repr(error)).splitlines()[0].strip(" :.")
        raise UserError(f"No tokenizer can be read from {folder}: {reason}.") from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer in {folder} needs a tokenizer.json and an end-of-sequence token; "
            "tokenizer_config.json names it as eos_token."
        )
    if has_wrong_merges(tokenizer, folder / SENTENCEPIECE):
        fix = _EXPORT_AGAIN if (folder / "processor_config.json").is_file() else _FIX
        _log.warning((_WRONG_MERGES + fix).format(folder=folder))
    return tokenizer


_WRONG_MERGES = (
    "The tokenizer.json in {folder} gives other tokens wherever two spaces meet than SentencePiece, with which the "
    "model was trained: an earlier release, or transformers 5, converted it. "
)
_FIX = (
    "To fix this, run: rm {folder}/tokenizer.json && cp SOURCE/tokenizer.model SOURCE/tokenizer_config.json {folder} "
    "(SOURCE is the folder that was imported). A run that was trained with these tokens keeps them until it is done."
)
_EXPORT_AGAIN = "Fix the tokenizer of the model that was exported, then export it again."


def read_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """A folder's tokenizer; nothing in the folder is run.

    A folder that holds ``tokenizer.model`` and no ``tokenizer.json`` is a Llama's (so are Vicuna's and LLaVA's own),
    and its ids are SentencePiece's. All others are read by transformers.

    Raises:
      ValueError: a SentencePiece model that cannot be followed, or special tokens that are not in the vocabulary, or
        elsewhere than the files say. Otherwise whatever transformers raises.
    """
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config, file = _read_dict(folder / "tokenizer_config.json"), folder / SENTENCEPIECE
    local |= _described(config)
    if file.is_file() and not (folder / "tokenizer.json").is_file():
        tokenizer = read_sentencepiece(file, config, _read_dict(folder / "special_tokens_map.json"), local)
    elif config.get("tokenizer_class") in _AS_WRITTEN:  # it need not look at a config.json that it may not know
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **local)
        if config.get(BOS_IN_TEMPLATE):
            tokenizer.add_bos_token = True
    else:
        from transformers import AutoTokenizer  # imports torch where it is installed: 3 s

        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    if config.get("legacy") is False:  # which transformers reads and does not save
        tokenizer.init_kwargs["legacy"] = False
    _check_special_tokens(tokenizer, folder, config)
    return tokenizer


def _described(config):
    """Special tokens that ``tokenizer_config.json`` describes by objects, without the mark that transformers wants."""
    found = {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, dict)}
    return {name: value["content"] for name, value in found.items() if "__type" not in value and "content" in value}


def _check_special_tokens(tokenizer, folder, config):
    """Special tokens are in the vocabulary, where the files say; a name that is empty is none.

    For transformers, an empty name is the unknown token, or, where that is empty too, looked up without end. It gives
    another id than the files do to a token that does not follow on those before it.
    """
    empty = [name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if getattr(tokenizer, name, None) == ""]
    stated = _stated_ids(folder, config)
    if "eos_token" in empty:
        known = ", ".join(map(str, tokenizer.added_tokens_decoder.values())) or "none"
        raise ValueError(
            f"an empty string is given as its {', '.join(empty)}; write their names into tokenizer_config.json "
            f"(the vocabulary's special tokens are {known})"
        )
    for name in empty:
        setattr(tokenizer, name, None)
    vocabulary, end = tokenizer.get_vocab(), tokenizer.eos_token
    if end is not None and end not in stated and vocabulary.get(end, 0) >= tokenizer.vocab_size:
        raise ValueError(f"its eos_token {end!r} is not in its vocabulary; correct it in tokenizer_config.json")
    wrong = [(token, i) for token, i in stated.items() if vocabulary.get(token) != i]
    if wrong:
        token, i = wrong[0]
        raise ValueError(
            f"its files give the special token {token!r} the id {i}, which does not follow on the other tokens' ids; "
            f"correct it, or add the tokens that are missing before it"
        )


def _stated_ids(folder, config):
    """Added tokens with their ids, as the files of a folder state them."""
    added = _read_dict(folder / "tokenizer.json").get("added_tokens") or []
    found = {token["content"]: token["id"] for token in added}
    decoder = config.get("added_tokens_decoder") or {}
    found |= {token["content"]: int(i) for i, token in decoder.items()}
    return found | dict(_read_dict(folder / "added_tokens.json"))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, source: pathlib.Path, to: pathlib.Path) -> None:
    """Writes a tokenizer that was read from the folder ``source``, so that it is read back alike."""
    tokenizer.save_pretrained(to)
    if (source / SENTENCEPIECE).is_file():  # which LLaVA's own code reads, and transformers no longer writes
        shutil.copyfile(source / SENTENCEPIECE, to / SENTENCEPIECE)


def prefixes_once(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether text that follows a special token goes on without SentencePiece's space.

    So it does in the slow tokenizer, which LLaVA uses, where ``tokenizer_config.json`` says ``legacy: false``.
    """
    return tokenizer.init_kwargs.get("legacy") is False


def _read_dict(file: pathlib.Path) -> Mapping[str, Any]:
    values = read_json(file) if file.is_file() else {}
    return values if isinstance(values, dict) else {}


def positions(tokenizer: PreTrainedTokenizerFast) -> int:
    """Text positions that a model is said to take: what its tokenizer names, else LLaVA-1.5's and Vicuna's."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 2**24 else 4096


def unsayable(tokenizer: PreTrainedTokenizerFast, vocab: int) -> tuple[int, ...]:
    """Ids of a vocabulary of that size which no text has trained: ``<image>``, and those beyond the tokenizer's."""
    mark = tokenizer.get_vocab().get(IMAGE_MARK, vocab)
    return tuple(sorted({*range(len(tokenizer), vocab), *range(mark, min(mark + 1, vocab))}))


def train_miniature_tokenizer(edition: int = 1) -> PreTrainedTokenizerFast:
    """Makes the miniatures' tokenizer: byte-level BPE of :data:`MINIATURE_VOCAB` tokens on text of training scenes.

    A model is to read words that it never saw, so printed words are spelt. Of the first edition they are left out of
    that text, and so come in letters or nearly so; of the second each letter and digit is a token of its own. The
    result is the same each time.
    """
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alone = pre_tokenizers.Split(Regex("USER|ASSISTANT|[A-Z0-9]"), behavior="isolated")
    tokenizer.pre_tokenizer = level if edition == 1 else pre_tokenizers.Sequence([alone, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MINIATURE_VOCAB if edition == 1 else MINIATURE_VOCAB - 8,  # with room for tokens to be added
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts() if edition == 1 else _second_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def _second_texts():
    from stf_jax.data.conversation import SYSTEM

    for index in range(4000):
        scene = world_text.make_scene(0, index)
        yield f"{SYSTEM} USER: \n{world_text.DESCRIBE} ASSISTANT: {world_text.caption(scene)}\n"
        for question in world_text.questions(scene, np.random.default_rng(index)):
            yield f"USER: {question.text}\n{SHORT_ANSWER} ASSISTANT: {question.answer}"


def _texts():
    from stf_jax.data.conversation import SYSTEM

    for index in range(2000):
        scene = make_scene(0, index)
        yield f"{SYSTEM} USER: \nDescribe the picture. ASSISTANT: "
        yield caption(scene).replace(scene.word, "") if scene.word else caption(scene)
        for question in questions(scene, np.random.default_rng(index)):
            if question.kind != "reading":
                yield f"USER: {question.text}\n{SHORT_ANSWER} ASSISTANT: {question.answer}"
            else:
                yield f" {question.text} ASSISTANT:"
