"""Llama's tokenizers, id for id against SentencePiece itself."""

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
    """As conversations are encoded: names of special tokens are text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]


def converted_by_transformers(source, to):
    """As folders that were imported before hold it: merges by token id."""
    LlamaTokenizer.from_pretrained(source).save_pretrained(to)
    shutil.copy(f"{source}/tokenizer.model", to)


def test_ids_are_sentencepieces_own(llama, sentencepiece_model):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    texts = make_texts(10_000)
    assert sum("  " in text for text in texts) > 5_000
    wrong = [text for text, ours, own in zip(texts, ids(llama, texts), model.encode(texts), strict=True) if ours != own]
    assert wrong == []
    assert llama.tokenize("a  b") == ["\u2581a", "\u2581", "\u2581b"]
    assert llama("a  b").input_ids == [model.bos_id(), *model.encode("a  b")]


def test_texts_come_back(llama):
    texts = [text for text in make_texts(500, seed=1) if "\u2581" not in text]
    assert [llama.decode(one) for one in ids(llama, texts)] == texts


def test_an_imported_tokenizer_is_read_alike_by_all(llama, sentencepiece_model, tmp_path, caplog):
    """By transformers' own class, by the tokenizers library, and by us."""
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


def test_a_folder_that_transformers_converted_is_told_with_the_command_that_fixes_it(llama, tmp_path, caplog):
    source, folder = llama.name_or_path, tmp_path / "old"
    converted_by_transformers(source, folder)
    with caplog.at_level(logging.WARNING, "stf_jax"):
        assert load_tokenizer(str(folder)).tokenize("a  b") == ["\u2581a", "\u2581\u2581", "b"]
    command = f"rm {folder}/tokenizer.json && cp SOURCE/tokenizer.model SOURCE/tokenizer_config.json {folder}"
    (said,) = caplog.messages
    assert f" run: {command} (SOURCE is" in said
    (folder / "tokenizer.model").unlink()
    assert has_wrong_merges(load_tokenizer(str(folder)), folder / "tokenizer.model")  # Llama's are known without it
    subprocess.run(command.replace("SOURCE", source), shell=True, check=True)
    caplog.clear()
    texts = make_texts(100, seed=3)
    assert ids(load_tokenizer(str(folder)), texts) == ids(llama, texts)
    assert caplog.messages == []


def test_a_model_of_another_format_beside_tokenizer_json_is_left_alone(tmp_path, caplog):
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
def test_other_models_are_read_alike(tmp_path, options):
    model = train_sentencepiece(tmp_path, **options)
    texts = [text.replace("\x00", "") for text in make_texts(500, seed=4)]
    assert ids(load_tokenizer(str(tmp_path)), texts) == model.encode(texts)


@pytest.mark.parametrize("options", [{}, {"model_type": "unigram"}], ids=["spaces dropped", "unigram"])
def test_a_model_that_cannot_be_followed_is_refused(tmp_path, options):
    train_sentencepiece(tmp_path, **options)
    with pytest.raises(UserError, match=rf"No tokenizer can be read from {tmp_path}: tokenizer\.model .*\.$"):
        load_tokenizer(str(tmp_path))


def test_special_tokens_are_the_models_own_where_no_file_names_them(tmp_path):
    train_sentencepiece(tmp_path, **IDENTITY, bos_piece="<begin>", eos_piece="<end>", pad_id=3)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None, "add_bos_token": True}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<begin>", "<end>", "<unk>")
    assert tokenizer("").input_ids == [1]
