"""Exports as other programs use them: what models and processors give, files, README, and prompts however made."""

import inspect
import json
import os
import pathlib
import re
import shutil
import stat
import warnings

import numpy as np
import pytest
import torch
from make_models import load, make, make_image, make_run, turn
from transformers import AutoProcessor, PreTrainedTokenizerFast

from stf_jax.config import FusionConfig
from stf_jax.convert import main
from stf_jax.data.conversation import begin_tokens, encode, template_items
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.runtime.cli import door
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.exports import export_native
from stf_jax.weights.imports import import_weights

pytestmark = pytest.mark.usefixtures("torch_alone")

SLOTS = {"mbtf_stf": 9, "mlp": 36}
ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Fusion → folder of the model, folder of its export."""
    root = tmp_path_factory.mktemp("exports")
    for fusion in SLOTS:
        make(root / fusion, FusionConfig(fusion), "clip", "llama")
        export_hf(root / fusion, root / f"{fusion}-hf")
    return {fusion: (root / fusion, root / f"{fusion}-hf") for fusion in SLOTS}


@pytest.fixture(scope="module")
def plain(exports, tmp_path_factory):
    """Fusion → folder of the export of the same model, had it been trained on captions."""
    root = tmp_path_factory.mktemp("plain")
    for fusion, (model, _) in exports.items():
        model = shutil.copytree(model, root / fusion)
        values = json.loads((model / "model.json").read_text())
        (model / "model.json").write_text(json.dumps(values | {"template": "plain"}))
        export_hf(model, root / f"{fusion}-hf")
    return {fusion: root / f"{fusion}-hf" for fusion in exports}


@pytest.fixture(scope="module")
def opened(exports):
    """The authors' model in PyTorch, its processor, and a question with two images."""
    model, processor = load(exports["mbtf_stf"][1])
    inputs = processor.apply_chat_template(
        [turn("Which?", make_image(1), make_image(2))],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model, processor, inputs


# ---- The model -------------------------------------------------------------------------------------------------------


def test_image_features_are_what_transformers_5_defines(opened):
    model, _, inputs = opened
    with torch.no_grad():
        output = model.get_image_features(inputs["pixel_values"], return_dict=True)
        last, tokens, states = model.get_image_features(inputs["pixel_values"], return_dict=False)
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        is_image = inputs["input_ids"] == model.config.image_token_id
        embedded[is_image] = output.pooler_output.flatten(0, 1)
        mixed = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
        assert torch.equal(mixed, model(**inputs).logits)
    assert output.pooler_output.shape == (2, 9, 32)
    assert torch.equal(tokens, output.pooler_output)
    assert torch.equal(last, output.last_hidden_state)
    assert len(states) == len(output.hidden_states) == 5


@pytest.mark.parametrize("said", [True, False])
def test_return_dict_false_gives_a_tuple(opened, monkeypatch, said):
    model, _, inputs = opened
    how = {"return_dict": False} if said else {}
    with torch.no_grad():
        whole, inner = model(**inputs), model.model(**inputs)
        if not said:
            monkeypatch.setattr(model.config, "return_dict", False)
        logits, *_ = model(**inputs, **how)
        hidden, *_ = model.model(**inputs, **how)
        loss, again, *_ = model(**inputs, labels=inputs["input_ids"], **how)
    assert torch.equal(logits, whole.logits)
    assert torch.equal(hidden, inner.last_hidden_state)
    assert loss.ndim == 0
    assert torch.equal(again, logits)


def test_the_cache_has_whatever_name_a_release_gives_it(opened, monkeypatch):
    """transformers 5.24 calls it ``cache``, and warns wherever ``past_key_values`` is passed or read."""
    model, _, inputs = opened
    for forward in (model.forward, model.model.forward):
        assert "past_key_values" not in inspect.signature(forward).parameters
    passed, inner = {}, model.model.language_model.forward

    def forward(cache=None, **kwargs):
        passed.update(kwargs, cache=cache)
        return inner(**kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", forward)
    kept = object()
    model(**inputs, cache=kept)
    assert passed["cache"] is kept
    assert "past_key_values" not in passed


def test_generating_warns_of_nothing(opened):
    model, _, inputs = opened
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


# ---- The processor ---------------------------------------------------------------------------------------------------


def test_a_batch_of_images_is_that_many_images(opened):
    _, processor, _ = opened
    images = [np.asarray(make_image(i)) for i in range(3)]
    text = ["<image> <image>", "<image>"]
    wanted = processor(text=text, images=images, padding=True, return_tensors="pt")["pixel_values"]
    assert len(wanted) == 3
    channels_first = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    for shown in (np.stack(images), channels_first, [images[:2], images[2:]], [np.stack(images[:2]), images[2]]):
        found = processor(text=text, images=shown, padding=True, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="3 <image>, but there are 2 images"):
        processor(text=text, images=np.stack(images[:2]), padding=True)


@pytest.mark.parametrize("fusion", SLOTS)
def test_answers_have_no_leading_space(exports, fusion):
    """The template teaches a space before the answer; a tokenizer of bytes keeps it."""
    processor = AutoProcessor.from_pretrained(exports[fusion][1], trust_remote_code=True)
    ours = load_tokenizer("miniature")
    ids = ours(" a red  cube", add_special_tokens=False).input_ids
    assert ours.decode(ids) == " a red  cube"
    assert processor.decode(ids) == processor.tokenizer.decode(ids) == "a red  cube"
    assert processor.batch_decode([ids, ids]) == ["a red  cube"] * 2


@pytest.mark.parametrize("fusion", SLOTS)
def test_special_tokens_in_a_text_are_those_tokens(exports, tmp_path, fusion):
    """As in every model of Hugging Face, whatever the source's tokenizer says of itself."""
    model = shutil.copytree(exports[fusion][0], tmp_path / "model")
    file = model / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": True, "add_bos_token": True}))
    export_hf(model, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert processor.tokenizer("<s>", add_special_tokens=False).input_ids == [1]
    assert processor.tokenizer("</s>").input_ids == [2]
    assert processor(text=["<s><unk></s>"])["input_ids"] == [[1, 0, 2]]


# ---- Prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["v1", "plain"])
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("question", ["Which is <image> it? ", ""])
@pytest.mark.parametrize("fusion", SLOTS)
def test_a_prompt_is_the_same_however_it_is_made(exports, plain, fusion, images, template, question):
    """Through apply_chat_template, the processor, or a server, which adds no special tokens; BOS stands there once."""
    folder = plain[fusion] if template == "plain" else exports[fusion][1]
    shown = tuple(make_image(i) for i in range(images))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    turns = [turn(question, *shown)]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    filled = text.replace("<image>", "<image>" * SLOTS[fusion])
    ways = [
        processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"],
        processor(text=[text], images=list(shown) or None)["input_ids"],
        [processor.tokenizer(filled, add_special_tokens=False).input_ids],
        [processor.tokenizer(filled).input_ids],
    ]
    record = Record("a", shown, (Turn("human", "<image>" * images + question.replace("<image>", "")),))
    prompt = encode(template_items(template, record), load_tokenizer("miniature"), SLOTS[fusion])
    ours = np.where(prompt.is_image, processor.image_token_id, prompt.tokens).tolist()
    assert ways == [[ours]] * 4
    assert ours.count(1) == 1


def test_a_model_without_bos_has_none_in_its_template(exports, tmp_path):
    model = shutil.copytree(exports["mbtf_stf"][0], tmp_path / "model")
    file = model / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    export_hf(model, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert processor.apply_chat_template([turn("What?")]).startswith("A chat")
    assert 1 not in processor(text=["What?"])["input_ids"][0]
    assert begin_tokens(load_tokenizer(str(tmp_path / "hf"))) == []


def test_an_export_read_again_begins_texts_as_the_model_did(exports, tmp_path):
    """Its tokenizer adds no BOS in others' programs; here, where no template is rendered, it does."""
    for _, folder in exports.values():
        assert begin_tokens(load_tokenizer(str(folder))) == [1]
        assert PreTrainedTokenizerFast.from_pretrained(folder)("").input_ids == []
    import_weights(str(folder), tmp_path / "imported")
    assert begin_tokens(load_tokenizer(str(tmp_path / "imported" / "tokenizer"))) == [1]


def test_texts_without_the_template_begin_with_bos_in_our_processor(opened):
    _, processor, _ = opened
    for text, wanted in (("What?", 1), ("<s>What?", 1)):
        assert processor(text=[text])["input_ids"][0].count(1) == wanted
    assert 1 not in processor(text=["What?"], add_special_tokens=False)["input_ids"][0]


def test_verify_notices_a_template_without_bos(exports, tmp_path, capsys):
    model, folder = exports["mbtf_stf"]
    broken = shutil.copytree(folder, tmp_path / "hf")
    file = broken / "chat_template.jinja"
    assert file.read_text().startswith("{{ bos_token }}")
    file.write_text(file.read_text().removeprefix("{{ bos_token }}"))
    assert door(main, ["verify", str(model), str(broken), "--questions=1"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "a server (the rendered template, no special tokens added) gives ['A', " in said
    assert "where training has ['<s>', 'A', " in said
    assert "(token 0 of " in said


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_files_have_the_mode_of_the_umask(exports, tmp_path):
    """safetensors makes its files, and tempfile its folders, for their owner alone."""
    model, folder = exports["mbtf_stf"]
    before = os.umask(0o027)
    try:
        export_hf(model, tmp_path / "hf")
        export_native(model, tmp_path / "native")
        import_weights(str(folder), tmp_path / "imported")
        make_run(tmp_path / "run", model, 1)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) > 30
    assert {path: oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


@pytest.mark.parametrize("fusion", SLOTS)
def test_the_snippet_of_the_readme_answers(exports, tmp_path, monkeypatch, capsys, fusion):
    model, folder = exports[fusion]
    text = (folder / "README.md").read_text()
    for fact in ("`v1`", f"{SLOTS[fusion]} per image", "float32", f"`{model}`", "vllm serve"):
        assert fact in text
    assert ("trust" in text) == (fusion != "mlp")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 30
    here = shutil.copytree(folder, tmp_path / "here")
    make_image(1).save(here / "image.jpg")
    monkeypatch.chdir(here)
    exec(code, {})
    said = capsys.readouterr().out
    assert said.strip()
    assert not said.startswith(" ")


def test_the_package_for_lmms_eval_asks_for_what_that_needs(exports):
    """lmms-eval 0.7.3 asks for filelock of any version, and imports a module that later ones lack."""
    wanted = re.search(r"^filelock==\S+", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE).group()
    assert f'"{wanted}"' in (exports["mlp"][1] / "lmms_eval_stf" / "pyproject.toml").read_text()
