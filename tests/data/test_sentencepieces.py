"""Tests that Llama's tokenizers give exactly SentencePiece's ids."""

import json
import logging
import pathlib
import shutil
import subprocess

import pytest
import sentencepiece
from hard_texts import IDENTITY, make_texts, train_sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer

from stf_jax.config import UserError
from stf_jax.data.sentencepieces import has_wrong_merges
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.weights.imports import _save_tokenizer


def ids(tokenizer, texts):
    """Encodes texts as in conversations, where names of special tokens are ordinary text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]


def converted_by_transformers(source, to):
    """Saves a tokenizer as earlier imports did, with merges in the order of token ids."""
    LlamaTokenizer.from_pretrained(source).save_pretrained(to)
    shutil.copy(f"{source}/tokenizer.model", to)


def test_ids_match_sentencepiece(llama, sentencepiece_model):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    texts = make_texts(10_000)
    assert sum("  " in text for text in texts) > 5_000
    wrong = [text for text, ours, own in zip(texts, ids(llama, texts), model.encode(texts), strict=True) if ours != own]
    assert wrong == []
    assert llama.tokenize("a  b") == ["\u2581a", "\u2581", "\u2581b"]
    assert llama("a  b").input_ids == [model.bos_id(), *model.encode("a  b")]


def test_texts_round_trip(llama):
    texts = [text for text in make_texts(500, seed=1) if "\u2581" not in text]
    assert [llama.decode(one) for one in ids(llama, texts)] == texts


def test_an_imported_tokenizer_is_the_same_for_all_libraries(llama, sentencepiece_model, tmp_path, caplog):
    """By transformers, by the tokenizers library, and by load_tokenizer."""
    assert _save_tokenizer(pathlib.Path(llama.name_or_path), tmp_path / "ours") == ""
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    texts = make_texts(200, seed=2)
    expected = model.encode(texts)
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    for tokenizer in (
        load_tokenizer(str(tmp_path / "ours")),
        AutoTokenizer.from_pretrained(tmp_path / "ours"),
    ):
        assert ids(tokenizer, texts) == expected
        assert tokenizer("a  b").input_ids == [model.bos_id(), *model.encode("a  b")]
    alone = Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json"))
    assert alone.encode("def f():\n    return 1", add_special_tokens=False).ids == model.encode(
        "def f():\n    return 1"
    )


def test_the_warning_for_a_converted_tokenizer_has_the_command_that_fixes_it(llama, tmp_path, caplog):
    source, folder = llama.name_or_path, tmp_path / "old"
    converted_by_transformers(source, folder)
    with caplog.at_level(logging.WARNING, "stf_jax"):
        assert load_tokenizer(str(folder)).tokenize("a  b") == ["\u2581a", "\u2581\u2581", "b"]
    command = f"rm {folder}/tokenizer.json && cp SOURCE/tokenizer.model SOURCE/tokenizer_config.json {folder}"
    (message,) = caplog.messages
    assert f" run: {command} (SOURCE is" in message
    (folder / "tokenizer.model").unlink()
    assert has_wrong_merges(load_tokenizer(str(folder)), folder / "tokenizer.model")  # Llama's is detected without it
    subprocess.run(command.replace("SOURCE", source), shell=True, check=True)
    caplog.clear()
    texts = make_texts(100, seed=3)
    assert ids(load_tokenizer(str(folder)), texts) == ids(llama, texts)
    assert caplog.messages == []


def test_a_model_of_another_format_next_to_tokenizer_json_is_ignored(tmp_path, caplog):
    """Llama 3's ``tokenizer.model`` is tiktoken's."""
    load_tokenizer("miniature").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    load_tokenizer(str(tmp_path))
    assert caplog.messages == []


# ---- Other SentencePiece models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        IDENTITY,
        {**IDENTITY, "byte_fallback": False},
        {**IDENTITY, "add_dummy_prefix": False},
        {**IDENTITY, "allow_whitespace_only_pieces": True},
    ],
    ids=["llama", "unknown", "no prefix", "spaces"],
)
def test_other_models_match_sentencepiece(tmp_path, options):
    model = train_sentencepiece(tmp_path, **options)
    texts = [text.replace("\x00", "") for text in make_texts(500, seed=4)]
    assert ids(load_tokenizer(str(tmp_path)), texts) == model.encode(texts)


@pytest.mark.parametrize("options", [{}, {"model_type": "unigram"}], ids=["spaces dropped", "unigram"])
def test_an_unsupported_model_is_refused(tmp_path, options):
    train_sentencepiece(tmp_path, **options)
    with pytest.raises(UserError, match=rf"No tokenizer can be read from {tmp_path}: tokenizer\.model .*\.$"):
        load_tokenizer(str(tmp_path))


def test_special_tokens_default_to_the_models(tmp_path):
    train_sentencepiece(tmp_path, **IDENTITY, bos_piece="<begin>", eos_piece="<end>", pad_id=3)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None, "add_bos_token": True}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<begin>", "<end>", "<unk>")
    assert tokenizer("").input_ids == [1]
