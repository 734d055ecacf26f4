"""Tests the miniatures' tokenizers, and the errors for tokenizers that cannot be used."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data.scenes import (
    COLORS,
    HELD_OUT_WORDS,
    SHAPES,
    SHORT_ANSWER,
    TRAINING_WORDS,
    make_caption,
    make_scene,
)
from stf_jax.data.sources.scenes import SceneRecords
from stf_jax.data.tokenizer import (
    MINIATURE,
    MINIATURE_VOCAB,
    load_tokenizer,
    train_miniature_tokenizer,
    untrained_tokens,
)
from stf_jax.data.world import FORM_LABELS
from stf_jax.models.decoders.llama import SYSTEM

WORDS = TRAINING_WORDS + HELD_OUT_WORDS


@pytest.fixture(scope="module", params=[1, 2])
def edition(request):
    return request.param


@pytest.fixture(scope="module")
def miniature(edition):
    return load_tokenizer("miniature" if edition == 1 else "miniature/2")


@pytest.fixture(scope="module")
def trained(edition):
    return train_miniature_tokenizer(edition)


def corpus(edition):
    """Yields the texts that the miniatures read and generate, and texts that they never saw."""
    for task in ("documents", "captions"):
        for held_out in (False, True):
            records = SceneRecords(task, 40, seed=11, held_out=held_out, edition=edition)
            yield from (turn.text for index in range(40) for turn in records[index].turns)
    yield f"{SYSTEM} USER: \nDescribe the picture.\n{SHORT_ANSWER} ASSISTANT: "
    yield from ("", " ", "Größe 日本 🤗\t\n\x00", "ASSISTANT:</s>USER: x", *WORDS)


def backend(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_special_tokens(miniature):
    assert (miniature.bos_token_id, miniature.eos_token_id, miniature.pad_token_id) == (1, 2, 0)
    assert miniature("").input_ids == [1]
    assert miniature.is_fast
    assert len(miniature) <= MINIATURE_VOCAB
    assert max(miniature.get_vocab().values()) < MINIATURE_VOCAB


def test_any_text_round_trips(miniature, edition):
    for text in corpus(edition):
        assert miniature.decode(ids(miniature, text)) == text
        assert miniature(text).input_ids == [1, *ids(miniature, text)]


def test_training_is_deterministic(trained, edition):
    again = train_miniature_tokenizer(edition)
    assert backend(again) == backend(trained)


def test_the_committed_tokenizer_matches_training(miniature, trained, edition):
    assert trained.get_vocab() == miniature.get_vocab()
    assert backend(trained) == backend(miniature)
    assert [ids(trained, text) for text in corpus(edition)] == [ids(miniature, text) for text in corpus(edition)]


def test_common_words_are_single_tokens(miniature, edition):
    for word in (*COLORS, *SHAPES, "small", "large", "left", "bottom"):
        assert len(ids(miniature, f" {word}")) == 1, word
    sentence = (
        make_caption(make_scene(3, 3)) if edition == 1 else "a small red star at the top, the text 42 at the bottom"
    )
    assert len(ids(miniature, sentence)) < len(sentence) / 3


def test_printed_words_are_spelled_out(miniature):
    """In letters, except for parts of USER and ASSISTANT, so that a model can read words that it never saw."""
    pieces = {word: [miniature.decode([token]).strip() for token in ids(miniature, f" {word}")] for word in WORDS}
    assert all("".join(parts) == word for word, parts in pieces.items())
    for parts in pieces.values():
        assert all(len(part) == 1 or part in "ASSISTANT" or part in "USER" for part in parts if part), parts
    letters = {word for word, parts in pieces.items() if all(len(part) < 2 for part in parts)}
    assert len(letters) > 0.9 * len(WORDS)


def test_the_second_edition_spells_every_print_in_single_characters():
    """In any context, so that a print always has the same tokens."""
    tokenizer = load_tokenizer("miniature/2")
    numbers = [str(number) for number in range(10, 100)]
    for text in (*WORDS, *FORM_LABELS, *numbers):
        for before, after in (("", ""), (" ", "\n"), ("the text ", " at the top"), ("USER: ", "? ASSISTANT:")):
            pieces = [tokenizer.decode([token]) for token in ids(tokenizer, before + text + after)]
            begin = len(ids(tokenizer, before))
            assert pieces[begin : begin + len(text)] == [*text], (before, text, after)


def test_untrained_tokens():
    """They are the ids beyond the tokenizer's 501 tokens, and <image>."""
    miniature = load_tokenizer("miniature")
    assert untrained_tokens(miniature, 501) == ()
    assert untrained_tokens(miniature, 504) == (501, 502, 503)
    marked = load_tokenizer("miniature")
    marked.add_tokens(["<image>", "behind"])
    assert untrained_tokens(marked, 501) == ()
    assert untrained_tokens(marked, 502) == (501,)
    assert untrained_tokens(marked, 503) == (501,)
    assert untrained_tokens(marked, 505) == (501, 503, 504)


# ---- Invalid tokenizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "nowhere/at/all", str(MINIATURE / "tokenizer.json"), "miniatur"])
def test_a_missing_folder_is_reported_with_its_key(name):
    with pytest.raises(
        UserError, match=r"tokenizer is missing: .*--config\.data\.tokenizer=DIR.*configs/demo\.py"
    ) as e:
        load_tokenizer(name)
    assert repr(name) in str(e.value) if name else "no folder is given" in str(e.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"added_tokens": [], "model": 3}'])
def test_a_folder_without_a_tokenizer_is_reported(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=f"No tokenizer can be read from {tmp_path}: .+"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    endless.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"tokenizer in {tmp_path} needs a tokenizer.json and an end-of-sequence token"):
        load_tokenizer(str(tmp_path))


END = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
ADDED = END | {"content": "<x>", "special": True}


def changed(folder, name, **values):
    """Copies the miniature's tokenizer with values of one of its files changed; ``...`` removes a key."""
    shutil.copytree(MINIATURE, folder, dirs_exist_ok=True)
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in (known | values).items() if value is not ...}))
    return folder


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("tokenizer_config.json", {"unk_token": ""}, ("<s>", "</s>", None, "<unk>")),
        ("tokenizer_config.json", {"bos_token": "", "pad_token": ""}, (None, "</s>", "<unk>", None)),
        ("tokenizer_config.json", {"bos_token": None, "unk_token": ...}, (None, "</s>", None, "<unk>")),
        ("tokenizer_config.json", {"eos_token": END}, ("<s>", "</s>", "<unk>", "<unk>")),
        ("tokenizer_config.json", {"eos_token": {"__type": "AddedToken", **END}}, ("<s>", "</s>", "<unk>", "<unk>")),
        ("special_tokens_map.json", {"eos_token": END}, ("<s>", "</s>", "<unk>", "<unk>")),
        ("added_tokens.json", {"<x>": 501}, ("<s>", "</s>", "<unk>", "<unk>")),
    ],
)
def test_special_tokens_in_all_common_forms(tmp_path, name, values, expected):
    tokenizer = load_tokenizer(str(changed(tmp_path, name, **values)))
    assert tuple(getattr(tokenizer, f"{key}_token") for key in ("bos", "eos", "unk", "pad")) == expected
    assert tokenizer.eos_token_id == 2
    assert ids(tokenizer, "a b") == ids(load_tokenizer("miniature"), "a b")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert (again.bos_token, again.unk_token, again.pad_token) == (*expected[:1], *expected[2:])


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        (
            "tokenizer_config.json",
            {"bos_token": "", "eos_token": "", "unk_token": ""},
            r"it has an empty string as its bos_token, eos_token, unk_token; set them in "
            r"tokenizer_config\.json \(the vocabulary's special tokens are <unk>, <s>, </s>\)",
        ),
        ("tokenizer_config.json", {"eos_token": END | {"content": ""}}, "it has an empty string as its eos_token"),
        (
            "tokenizer_config.json",
            {"eos_token": "<end>"},
            "its eos_token '<end>' is not in its vocabulary",
        ),
        ("tokenizer_config.json", {"eos_token": 2}, "eos_token has to be either str or AddedToken"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"700": ADDED}}, "give the special token '<x>' the id 700"),
        ("added_tokens.json", {"<x>": 700}, "give the special token '<x>' the id 700"),
        ("tokenizer.json", {"added_tokens": [ADDED | {"id": 5}]}, "give the special token '<x>' the id 5"),
    ],
)
def test_invalid_special_tokens_are_reported(tmp_path, name, values, sentence):
    """With some, transformers would end an answer at the unknown token, or at an id that the model lacks."""
    with pytest.raises(UserError, match=rf"^No tokenizer can be read from {tmp_path}: .*{sentence}.*\.$"):
        load_tokenizer(str(changed(tmp_path, name, **values)))


@pytest.mark.parametrize("value", [None, ...])
def test_a_missing_end_of_sequence_is_reported(tmp_path, value):
    folder = changed(tmp_path, "tokenizer_config.json", eos_token=value)
    with pytest.raises(UserError, match=r"an end-of-sequence token \(eos_token in tokenizer_config\.json\)\.$"):
        load_tokenizer(str(folder))


def test_a_saved_tokenizer_round_trips(tmp_path, miniature, edition):
    miniature.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert [ids(again, text) for text in corpus(edition)] == [ids(miniature, text) for text in corpus(edition)]
