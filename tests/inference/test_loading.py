"""Models loaded from runs, imported folders and exports give the same tokens as each other and as PyTorch."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from make_models import CONTROL, DECODERS, LLAMA, TOWERS, load, make, make_image, make_run, turn
from reference import decoder, tower
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stf_jax.config import FusionConfig, MeshConfig, UserError
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference import decoding
from stf_jax.inference.loading import load_generator
from stf_jax.models import spec
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import VISION
from stf_jax.parallel.mesh import make_mesh
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.export_stf import export_llava_stf
from stf_jax.weights.exports import export_native
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model

pytestmark = pytest.mark.usefixtures("torch_setup")

CASES = {
    "llama": (FusionConfig("mbtf_stf"), "clip", "llama, full"),
    "llama, tied": (FusionConfig("avg_pool"), "siglip", "llama, tied"),
    "llama-3": (FusionConfig("mlp"), "clip", "llama-3"),
    "mistral": (FusionConfig("mlp"), "siglip", "mistral"),
    "qwen2": (FusionConfig("avg_pool"), "clip", "qwen2"),
    "qwen3": (FusionConfig("mbtf_stf"), "siglip", "qwen3"),
}
LIMIT = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Case → an imported folder, and the export of it."""

    @functools.cache
    def get(case):
        root = epath.Path(tmp_path_factory.mktemp("case"))
        imported = make(root / "imported", *CASES[case])
        export_hf(imported, root / "hf")
        return imported, root / "hf"

    return get


def rewrite(file, **changes):
    """Changes keys of a JSON file, or keys of an object in it. None removes a key."""
    values = json.loads(file.read_text())
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) else change
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# Questions of unequal length with zero, one or two images of the tower's size, which both sides preprocess identically.
QUESTIONS = [
    (
        "Which " + "very " * (3 * i % 7) + f"odd thing is number {i}?",
        [make_image(9 * i + j, (36, 36)) for j in range(image_count)],
    )
    for i, image_count in enumerate((1, 0, 2, 1, 2, 0))
]


@functools.cache
def answers_here(folder):
    """Tokens that our generator samples for each question, int [G]; those after a stop are meaningless."""
    generator, _ = load_generator(epath.Path(folder), make_mesh(MeshConfig(1, 1, 1)), "float32")
    generator.decode_text = np.ndarray.tolist  # returns tokens instead of text
    records = [
        Record("asked", tuple(p.copy for p in images), (Turn("human", "<image>\n" * len(images) + text),))
        for text, images in QUESTIONS
    ]
    return list(generator.generate(records, LIMIT, rows=len(QUESTIONS)))


def answers_in_torch(folder):
    """The same from an export in PyTorch, all questions in one batch padded by transformers."""
    model, processor = load(folder)
    texts = [
        processor.apply_chat_template([turn(text, *images)], add_generation_prompt=True, tokenize=False)
        for text, images in QUESTIONS
    ]
    flat = [one for _, images in QUESTIONS for one in images]
    inputs = processor(text=texts, images=flat, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
    return model, outputs[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_export_answers_equal_pytorch(folders, case):
    _, export = folders(case)
    model, outputs = answers_in_torch(export)
    assert type(model.model.language_model).__name__.lower().startswith(case[:5])
    assert [len(answer) for answer in outputs] == [LIMIT] * len(QUESTIONS)
    assert len({tuple(answer) for answer in outputs}) == len(QUESTIONS)  # images and prompts matter
    assert answers_here(export) == outputs


def test_answers_end_at_the_same_tokens(tmp_path):
    """Answers end at any stop token of the template or the tokenizer, and contain only trained tokens."""
    folder = make(tmp_path / "imported", FusionConfig("stf"), "clip", "llama", template="chatml")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.save_pretrained(folder / "tokenizer")
    export_hf(folder, tmp_path / "hf")
    stop, end, mark = (*tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]), len(tokenizer))
    values = load_file(tmp_path / "hf" / "model.safetensors")
    head = values["lm_head.weight"]
    head[stop] *= 2.2
    head[end] = 0.8 * head[100] + 0.8 * head[200]
    head[mark:] = 4 * head[: len(head) - mark]  # <image>, and rows beyond it: nothing else would be outputs
    save_file(values, tmp_path / "hf" / "model.safetensors", {"format": "pt"})

    def until_stop(answers, padding):
        for answer in answers:
            outputs = next((answer[: i + 1] for i, token in enumerate(answer) if token in (stop, end)), answer)
            assert set(answer[len(outputs) :]) <= {padding}  # padding follows the stop
            yield outputs

    outputs = list(until_stop(answers_in_torch(tmp_path / "hf")[1], tokenizer.pad_token_id))
    assert list(until_stop(answers_here(tmp_path / "hf"), stop)) == outputs
    assert {answer[-1] for answer in outputs if len(answer) < LIMIT} == {stop, end}
    assert max(map(len, outputs)) == LIMIT
    assert max(max(answer) for answer in outputs) < mark


@pytest.mark.parametrize("case", CASES)
def test_export_parameters_are_bit_identical(folders, case):
    start, export = folders(case)
    before, after = open_model(start), open_model(export)
    assert after.shapes == before.shapes
    for path in before.shapes:
        assert before.read(path).tobytes() == after.read(path).tobytes(), path
    assert after.step is None
    for part in ("vision", "llm", "template", "aspect"):
        assert getattr(after.description, part) == getattr(before.description, part)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_exports_keep_half_precision_and_load_onto_a_mesh(folders, tmp_path, dtype):
    start, _ = folders("qwen2")
    export_hf(start, tmp_path / "hf", dtype)
    before, after = open_model(start), open_model(epath.Path(tmp_path / "hf"))
    shardings = blueprint(after.config).shardings(make_mesh(MeshConfig(1, 4, 2)))
    loaded = []
    for path, value in after.restore(shardings):
        assert after.shapes[path] == jax.ShapeDtypeStruct(value.shape, value.dtype)
        assert value.dtype.name == dtype
        assert value.sharding == shardings[path]
        np.testing.assert_array_equal(np.asarray(value), before.read(path).astype(value.dtype))
        loaded.append(path)
    assert loaded == list(shardings)
    assert set(loaded) == set(before.shapes)


def test_run_export_and_reimport_give_equal_answers(folders, tmp_path):
    start, export = folders("llama")
    run = make_run(epath.Path(tmp_path / "run"), start, step=7)
    export_hf(run, epath.Path(tmp_path / "hf"))
    import_weights(str(tmp_path / "hf"), epath.Path(tmp_path / "again"))
    opened = {name: open_model(epath.Path(tmp_path / name)) for name in ("run", "hf", "again")}
    assert {name: saved.step for name, saved in opened.items()} == {"run": 7, "hf": None, "again": None}
    for file in ("config.json", "model.safetensors"):  # so its answers are the same
        assert (tmp_path / "hf" / file).read_bytes() == (export / file).read_bytes()
    outputs = answers_here(export)
    assert answers_here(run) == outputs
    assert answers_here(tmp_path / "again") == outputs


def test_exports_replaced_at_one_path_are_read_afterwards(folders, tmp_path):
    """The process keeps nothing of the first, neither shapes nor an entry in a table of presets."""
    before = dict(spec.VISION), dict(spec.LLM)
    path = epath.Path(tmp_path / "hf")
    for case in ("llama", "llama-3", "qwen2"):  # different fusions and kinds of language models
        start, export = folders(case)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(export, path)
        saved = open_model(path)
        assert saved.description.llm == saved.config.llm_shape == open_model(start).description.llm
        assert saved.description.vision == saved.config.vision_shape == open_model(start).description.vision
        assert (saved.config.vision, saved.config.llm) == (str(path), str(path))
        assert {path: leaf.shape for path, leaf in blueprint(saved.config).shapes.items()} == {
            path: leaf.shape for path, leaf in saved.shapes.items()
        }
    assert dict(spec.VISION) == before[0]
    assert dict(spec.LLM) == before[1]


def test_export_for_the_authors_code_is_loaded(llama, tmp_path, monkeypatch):
    """Its tower is detected from its tensors; its tokenizer is only the SentencePiece file."""
    shape = dict(image_size=28, patch_size=7, width=64, layers=24, heads=1, mlp=32)
    monkeypatch.setitem(TOWERS, "deep", dataclasses.replace(VISION["clip-l-14-336"], **shape))
    monkeypatch.setitem(DECODERS, "wide", dataclasses.replace(LLAMA, vocab=32_000, norm_eps=1e-5))
    taps = (23, 21, 18, 15, 12, 9, 6, 3)
    start = make(epath.Path(tmp_path / "start"), FusionConfig(taps=taps), "deep", "wide", aspect="pad")
    shutil.rmtree(start / "tokenizer")
    shutil.copytree(llama.name_or_path, start / "tokenizer")
    answers_in_torch = epath.Path(tmp_path / "answers_in_torch")
    export_llava_stf(start, answers_in_torch)
    assert not (answers_in_torch / "tokenizer.json").exists()
    generator, after = load_generator(answers_in_torch, make_mesh(MeshConfig(1, 1, 1)))
    before = open_model(start)
    assert after.shapes == before.shapes
    for path in before.shapes:
        assert before.read(path).tobytes() == after.read(path).tobytes(), path
    for part in ("vision", "llm", "template", "aspect"):
        assert getattr(after.description, part) == getattr(before.description, part)
    assert generator.slots == 4
    assert generator.plan.precision == "bfloat16"
    probe = "USER: What is <image> it?\n"
    assert load_tokenizer(str(after.tokenizer))(probe).input_ids == llama(probe).input_ids


def test_default_precision_is_that_of_the_run(folders, tmp_path):
    start, export = folders("llama, tied")
    run = make_run(epath.Path(tmp_path / "run"), start, step=1)  # in float32
    mesh = make_mesh(MeshConfig(1, 1, 1))
    expected_precision = {
        (run, ""): "float32",
        (run, "bfloat16"): "bfloat16",
        (export, ""): "bfloat16",
        (start, ""): "bfloat16",
    }
    for (folder, precision), expected in expected_precision.items():
        generator, _ = load_generator(folder, mesh, precision)
        assert {x.dtype.name for x in jax.tree.leaves(generator._weights)} == {expected}


@pytest.mark.parametrize("kind", ["imported", "run", "export"])
def test_loading_needs_memory_for_the_model_and_one_parameter(folders, tmp_path, kind):
    start, export = folders("qwen2")
    if kind == "run":
        start = make_run(epath.Path(tmp_path / "run"), start, step=1)
    folder = export if kind == "export" else start
    mesh = make_mesh(MeshConfig(1, 1, 1))
    generator, saved = load_generator(folder, mesh, "float32")
    generator.load_params([])
    before, loaded_bytes = live_bytes(), 0

    def checked_params():
        nonlocal loaded_bytes
        for path, x in saved.restore(generator.plan.shardings(mesh)):
            assert live_bytes() - before <= loaded_bytes + x.nbytes, path
            loaded_bytes += x.nbytes
            yield path, x
            del x

    generator.load_params(checked_params())
    assert live_bytes() - before == loaded_bytes == sum(leaf.size * 4 for leaf in saved.shapes.values())


def live_bytes():
    """Bytes of all live arrays; memory that several share counts once."""
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())


@pytest.mark.usefixtures("optimized")
def test_splitting_a_stack_does_not_gather_it():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    stack_sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    stack = jax.ShapeDtypeStruct((8, 256, 128), jnp.bfloat16, sharding=stack_sharding)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    program = decoding._compile_split(jnp.dtype(jnp.bfloat16), sharding, True).lower(stack).compile()
    assert "all-gather" not in program.as_text()
    # On a CPU the terms of the checksum, of twice the size, are materialized before they are added.
    assert program.memory_analysis().temp_size_in_bytes < 3.1 * (8 * 256 * 128 * 2 / 8)


# ---- Errors ----------------------------------------------------------------------------------------------------------


def remove_tensor(name):
    def change(folder):
        file = folder / "model.safetensors"
        values = load_file(file)
        del values[name]
        save_file(values, file, {"format": "pt"})

    return change


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def another_vocabulary(folder):
    words = {name: i for i, name in enumerate(["</s>", *(f"word{i}" for i in range(521))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def config(**changes):
    return lambda folder: rewrite(folder / "config.json", **changes)


DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "{folder} is neither the workdir of a run"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "{folder} is neither the workdir of a run"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "{folder} is not a complete model: it lacks tokenizer.",
    ),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "{folder}/config.json is not JSON"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "config.json must hold a JSON object"),
    "a tensor is missing": (
        remove_tensor("model.language_model.layers.1.mlp.up_proj.weight"),
        "model.language_model.layers.1.mlp.up_proj.weight (48, 32) is missing",
    ),
    "no projector": (remove_tensor("model.mm_projector.0.weight"), "mm_projector.0.weight"),
    "cut short": (truncate, "model.safetensors cannot be read as safetensors"),
    "another tokenizer": (another_vocabulary, "522 tokens exceed the 501 of {folder}; use the model's own."),
    "more layers": (config(text_config={"num_hidden_layers": 4}), "num_hidden_layers 4, but the tensors hold 3 layers"),
    "no such template": (config(conversation_template="v2"), "Unknown data.template='v2'"),
    "a template of templates": (config(conversation_template=["v1"]), "Unknown data.template=\"['v1']\""),
    "no patches": (config(vision_config={"patch_size": 0}), "{folder}: The vision tower has images of 36 pixels"),
    "words for taps": (
        config(stf_config={"taps": "4321"}),
        "config.json does not describe an STF-JAX export",
    ),
    "no window": (config(stf_config={"kernel": 0}), "config.json does not describe an STF-JAX export"),
    "no end of blocks": (config(stf_config={"depth": 10**7}), "config.json does not describe an STF-JAX export"),
    "fewer than none": (config(stf_config={"depth": -1}), "config.json does not describe an STF-JAX export"),
    "one mean": (
        lambda folder: rewrite(folder / "preprocessor_config.json", image_mean=0.5),
        "{folder}: The image processor's image_mean is 0.5, not three numbers.",
    ),
}


def load_error(folder):
    with pytest.raises(UserError) as error:
        load_generator(folder, make_mesh(MeshConfig(1, 1, 1)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_export_gives_one_sentence(folders, tmp_path, damage):
    folder = epath.Path(shutil.copytree(folders("llama")[1], tmp_path / "hf"))
    change, message = DAMAGES[damage]
    change(folder)
    assert message.format(folder=folder) in load_error(folder)


def test_incomplete_models_are_rejected(tmp_path):
    parts = {"vision, fusion": decoder("llama"), "fusion, llm": tower("clip")}
    for lacking, model in parts.items():
        folder = epath.Path(tmp_path / lacking)
        model.save_pretrained(folder)
        assert load_error(folder) == f"{folder} is not a complete model: it lacks {lacking}, tokenizer."


def test_folders_without_a_model_give_one_sentence(folders, tmp_path):
    start, _ = folders("llama")
    neither = "is neither the workdir of a run (it has no checkpoints/), nor imported weights, nor an export."
    (tmp_path / "file").write_text("text")
    for name in ("nowhere", "file", "."):
        folder = epath.Path(tmp_path / name)
        assert load_error(folder) == f"{folder} {neither}"
    native = epath.Path(tmp_path / "native")
    export_native(start, native)
    assert load_error(native) == f"{native} {neither}"
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert "has no complete checkpoint" in load_error(epath.Path(tmp_path / "new"))
    for content in ("{", "[]", "{}", '{"vision": 3}'):
        folder = epath.Path(shutil.copytree(start, tmp_path / "imported", dirs_exist_ok=True))
        (folder / "model.json").write_text(content)
        problem = "/model.json is not JSON: " if content == "{" else " does not describe its model: "
        assert load_error(folder).startswith(f"{folder}{problem}")
    shutil.copy(start / "model.json", folder)
    shutil.rmtree(folder / "tokenizer")
    copy = f"Copy the folder of its tokenizer to {folder}/tokenizer."
    assert load_error(folder) == f"{folder} is not a complete model: it lacks tokenizer. {copy}"
    run = make_run(epath.Path(tmp_path / "run"), start, step=1)
    rewrite(run / "config.json", model={"llm": "llama-9"})
    assert "model.llm='llama-9'" in load_error(run)
