"""Exports as other programs use them: models, processors, files, the README, and all ways to build prompts."""

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

from stf_jax.cli import run_command
from stf_jax.config import FusionConfig
from stf_jax.convert import main
from stf_jax.data.conversation import encode, initial_tokens, template_items
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.exports import export_native
from stf_jax.weights.imports import import_weights

pytestmark = pytest.mark.usefixtures("torch_setup")

SLOTS = {"mbtf_stf": 9, "mlp": 36}
ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Returns the folders of the model and of its export, by fusion."""
    root = tmp_path_factory.mktemp("exports")
    for fusion in SLOTS:
        make(root / fusion, FusionConfig(fusion), "clip", "llama")
        export_hf(root / fusion, root / f"{fusion}-hf")
    return {fusion: (root / fusion, root / f"{fusion}-hf") for fusion in SLOTS}


@pytest.fixture(scope="module")
def plain_exports(exports, tmp_path_factory):
    """Returns the export of the same model with the template of captions, by fusion."""
    root = tmp_path_factory.mktemp("plain")
    for fusion, (model, _) in exports.items():
        model = shutil.copytree(model, root / fusion)
        values = json.loads((model / "model.json").read_text())
        (model / "model.json").write_text(json.dumps(values | {"template": "plain"}))
        export_hf(model, root / f"{fusion}-hf")
    return {fusion: root / f"{fusion}-hf" for fusion in exports}


@pytest.fixture(scope="module")
def paper_model(exports):
    """Returns the paper's model in PyTorch, its processor, and a prompt with two images."""
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


def test_image_features_follow_transformers_5(paper_model):
    model, _, inputs = paper_model
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


@pytest.mark.parametrize("as_argument", [True, False])
def test_return_dict_false_gives_a_tuple(paper_model, monkeypatch, as_argument):
    model, _, inputs = paper_model
    kwargs = {"return_dict": False} if as_argument else {}
    with torch.no_grad():
        full, inner = model(**inputs), model.model(**inputs)
        if not as_argument:
            monkeypatch.setattr(model.config, "return_dict", False)
        logits, *_ = model(**inputs, **kwargs)
        hidden, *_ = model.model(**inputs, **kwargs)
        loss, logits_with_loss, *_ = model(**inputs, labels=inputs["input_ids"], **kwargs)
    assert torch.equal(logits, full.logits)
    assert torch.equal(hidden, inner.last_hidden_state)
    assert loss.ndim == 0
    assert torch.equal(logits_with_loss, logits)


def test_the_cache_is_passed_under_any_name(paper_model, monkeypatch):
    """transformers 5.24 calls it ``cache``, and warns if ``past_key_values`` is passed or read."""
    model, _, inputs = paper_model
    for forward in (model.forward, model.model.forward):
        assert "past_key_values" not in inspect.signature(forward).parameters
    passed, inner = {}, model.model.language_model.forward

    def forward(cache=None, **kwargs):
        passed.update(kwargs, cache=cache)
        return inner(**kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", forward)
    cache = object()
    model(**inputs, cache=cache)
    assert passed["cache"] is cache
    assert "past_key_values" not in passed


def test_generating_gives_no_warnings(paper_model):
    model, _, inputs = paper_model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


# ---- The processor ---------------------------------------------------------------------------------------------------


def test_all_ways_to_pass_images_are_equal(paper_model):
    _, processor, _ = paper_model
    images = [np.asarray(make_image(i)) for i in range(3)]
    text = ["<image> <image>", "<image>"]
    expected = processor(text=text, images=images, padding=True, return_tensors="pt")["pixel_values"]
    assert len(expected) == 3
    channels_first = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    for value in (np.stack(images), channels_first, [images[:2], images[2:]], [np.stack(images[:2]), images[2]]):
        found = processor(text=text, images=value, padding=True, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="3 <image>, but there are 2 images"):
        processor(text=text, images=np.stack(images[:2]), padding=True)


@pytest.mark.parametrize("fusion", SLOTS)
def test_answers_have_no_leading_space(exports, fusion):
    """The template has a space before the answer, which a byte-level tokenizer keeps."""
    processor = AutoProcessor.from_pretrained(exports[fusion][1], trust_remote_code=True)
    tokenizer = load_tokenizer("miniature")
    ids = tokenizer(" a red  cube", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == " a red  cube"
    assert processor.decode(ids) == processor.tokenizer.decode(ids) == "a red  cube"
    assert processor.batch_decode([ids, ids]) == ["a red  cube"] * 2


@pytest.mark.parametrize("fusion", SLOTS)
def test_names_of_special_tokens_become_those_tokens(exports, tmp_path, fusion):
    """As in every Hugging Face model, independently of the settings of the source's tokenizer."""
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
def test_all_ways_to_build_a_prompt_give_the_same_tokens(exports, plain_exports, fusion, images, template, question):
    """With apply_chat_template, the processor, or as servers do, which add no special tokens; there is one BOS."""
    folder = plain_exports[fusion] if template == "plain" else exports[fusion][1]
    image_list = tuple(make_image(i) for i in range(images))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    turns = [turn(question, *image_list)]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    expanded = text.replace("<image>", "<image>" * SLOTS[fusion])
    prompts = [
        processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"],
        processor(text=[text], images=list(image_list) or None)["input_ids"],
        [processor.tokenizer(expanded, add_special_tokens=False).input_ids],
        [processor.tokenizer(expanded).input_ids],
    ]
    record = Record("a", image_list, (Turn("human", "<image>" * images + question.replace("<image>", "")),))
    prompt = encode(template_items(template, record), load_tokenizer("miniature"), SLOTS[fusion])
    expected = np.where(prompt.is_image, processor.image_token_id, prompt.tokens).tolist()
    assert prompts == [[expected]] * 4
    assert expected.count(1) == 1


def test_a_template_has_no_bos_if_the_model_has_none(exports, tmp_path):
    model = shutil.copytree(exports["mbtf_stf"][0], tmp_path / "model")
    file = model / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    export_hf(model, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert processor.apply_chat_template([turn("What?")]).startswith("A chat")
    assert 1 not in processor(text=["What?"])["input_ids"][0]
    assert initial_tokens(load_tokenizer(str(tmp_path / "hf"))) == []


def test_an_imported_export_begins_texts_like_the_model(exports, tmp_path):
    """Its tokenizer adds no BOS in transformers; here, where the template is not rendered, it does."""
    for _, folder in exports.values():
        assert initial_tokens(load_tokenizer(str(folder))) == [1]
        assert PreTrainedTokenizerFast.from_pretrained(folder)("").input_ids == []
    import_weights(str(folder), tmp_path / "imported")
    assert initial_tokens(load_tokenizer(str(tmp_path / "imported" / "tokenizer"))) == [1]


def test_our_processor_adds_bos_to_texts_without_the_template(paper_model):
    _, processor, _ = paper_model
    for text, count in (("What?", 1), ("<s>What?", 1)):
        assert processor(text=[text])["input_ids"][0].count(1) == count
    assert 1 not in processor(text=["What?"], add_special_tokens=False)["input_ids"][0]


def test_verify_detects_a_template_without_bos(exports, tmp_path, capsys):
    model, folder = exports["mbtf_stf"]
    broken = shutil.copytree(folder, tmp_path / "hf")
    file = broken / "chat_template.jinja"
    assert file.read_text().startswith("{{ bos_token }}")
    file.write_text(file.read_text().removeprefix("{{ bos_token }}"))
    assert run_command(main, ["verify", str(model), str(broken), "--questions=1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "a server (the rendered template, no special tokens added) gives ['A', " in message
    assert "where training has ['<s>', 'A', " in message
    assert "(token 0 of " in message


def test_verify_names_the_end_of_a_prompt_that_is_cut(exports, tmp_path, capsys):
    model, folder = exports["mbtf_stf"]
    broken = shutil.copytree(folder, tmp_path / "hf")
    file = broken / "chat_template.jinja"
    file.write_text(file.read_text().replace(" ASSISTANT:", ""))
    assert run_command(main, ["verify", str(model), str(broken), "--questions=1"]) == 2
    got, number = re.search(r"gives (\[.*\]) where training has .* \(token (\d+) of ", capsys.readouterr().err).groups()
    assert got == "[]"
    assert int(number) > 0


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_file_modes_follow_the_umask(exports, tmp_path):
    """safetensors and tempfile give access only to the owner."""
    model, folder = exports["mbtf_stf"]
    previous = os.umask(0o027)
    try:
        export_hf(model, tmp_path / "hf")
        export_native(model, tmp_path / "native")
        import_weights(str(folder), tmp_path / "imported")
        make_run(tmp_path / "run", model, 1)
    finally:
        os.umask(previous)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) > 30
    assert {path: oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


@pytest.mark.parametrize("fusion", SLOTS)
def test_the_readmes_snippet_runs(exports, tmp_path, monkeypatch, capsys, fusion):
    model, folder = exports[fusion]
    text = (folder / "README.md").read_text()
    for fact in ("`v1`", f"{SLOTS[fusion]} per image", "float32", f"`{model}`", "vllm serve"):
        assert fact in text
    assert ("trust" in text) == (fusion != "mlp")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 30
    workdir = shutil.copytree(folder, tmp_path / "workdir")
    make_image(1).save(workdir / "image.jpg")
    monkeypatch.chdir(workdir)
    exec(code, {})
    output = capsys.readouterr().out
    assert output.strip()
    assert not output.startswith(" ")


def test_the_lmms_eval_package_pins_filelock(exports):
    """lmms-eval 0.7.3 accepts any version of filelock, but imports a module that later versions lack."""
    pin = re.search(r"^filelock==\S+", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE).group()
    assert f'"{pin}"' in (exports["mlp"][1] / "lmms_eval_stf" / "pyproject.toml").read_text()
