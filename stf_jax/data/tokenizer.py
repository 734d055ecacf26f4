"""Tokenizers: any that transformers reads from a local folder, and the small one of the miniatures."""

import json
import os
import pathlib

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data.records import IMAGE_MARK
from stf_jax.data.scenes import SHORT_ANSWER, caption, make_scene, questions
from stf_jax.runtime.files import fetched

MINIATURE = pathlib.Path(__file__).parent.parent / "weights" / "miniatures" / "tokenizer"
MINIATURE_VOCAB = 512
SENTENCEPIECE = "tokenizer.model"  # Llama's and Vicuna's vocabulary, as they publish it
FILES = ("tokenizer.json", SENTENCEPIECE, "vocab.json")  # one of which a folder with a tokenizer holds


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Reads a tokenizer from a local folder, or the embedded one for ``"miniature"``. Never downloads.

    Raises:
      UserError: no such folder, no tokenizer in it, or one that cannot tell which characters a token covers.
    """
    folder = MINIATURE if name == "miniature" else fetched(name)
    if not name or not os.path.isdir(folder):
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
        raise UserError(f"The tokenizer in {folder} needs a tokenizer.json and an end-of-sequence token.")
    return tokenizer


def read_tokenizer(folder: pathlib.Path, **how) -> PreTrainedTokenizerFast:
    """transformers' reading of a folder's tokenizer, nothing in it run; ``how`` is passed on.

    A folder that holds ``tokenizer.model`` and no ``tokenizer.json`` is a Llama's (so are Vicuna's and LLaVA's own).
    transformers reads some of those, by the model_type beside them, without the space that SentencePiece puts before a
    text; so its class is named here, and its ids are compared with SentencePiece's.

    Raises:
      ValueError: the ids differ. Otherwise whatever transformers raises.
    """
    how |= {"local_files_only": True, "trust_remote_code": False}
    file = folder / SENTENCEPIECE
    if not file.is_file() or (folder / "tokenizer.json").is_file():
        if _class(folder) == "PreTrainedTokenizerFast":  # it need not look at a config.json that it may not know
            return PreTrainedTokenizerFast.from_pretrained(folder, **how)
        from transformers import AutoTokenizer  # imports torch where it is installed: 3 s

        return AutoTokenizer.from_pretrained(folder, **how)
    if not (folder / "tokenizer_config.json").is_file():
        how["add_bos_token"] = True  # as Llama's are published
    tokenizer = LlamaTokenizer.from_pretrained(folder, **how)
    probe = "USER: What is it?\n A \u00fc."
    ids = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(probe)
    if tokenizer(probe, add_special_tokens=False).input_ids != ids:
        raise ValueError(f"transformers does not read {file.name} as SentencePiece does")
    return tokenizer


def _class(folder):
    try:
        return json.loads((folder / "tokenizer_config.json").read_bytes())["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def positions(tokenizer: PreTrainedTokenizerFast) -> int:
    """Text positions that a model is said to take: what its tokenizer names, else LLaVA-1.5's and Vicuna's."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 2**24 else 4096


def unsayable(tokenizer: PreTrainedTokenizerFast, vocab: int) -> tuple[int, ...]:
    """Ids of a vocabulary of that size which no text has trained: ``<image>``, and those beyond the tokenizer's."""
    mark = tokenizer.get_vocab().get(IMAGE_MARK, vocab)
    return tuple(sorted({*range(len(tokenizer), vocab), *range(mark, min(mark + 1, vocab))}))


def train_miniature_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the miniatures' tokenizer: byte-level BPE of :data:`MINIATURE_VOCAB` tokens on text of training scenes.

    Printed words are left out of that text, so that they are spelt in letters or nearly so: a model then reads words
    it never saw. The result is the same each time.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MINIATURE_VOCAB,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


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
