"""Models opened from runs, imported folders and exports, which answer alike, and as PyTorch does, token for token."""

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
from safetensors.torch import load_file, save_file
from theirs import decoder, tower
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stf_jax.config import FusionConfig, MeshConfig, UserError
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference import decoding
from stf_jax.inference.loading import load_generator
from stf_jax.models import presets
from stf_jax.models.presets import VISION
from stf_jax.runtime.mesh import make_mesh
from stf_jax.training.state import blueprint
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.export_stf import export_llava_stf
from stf_jax.weights.exports import export_native
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model

pytestmark = pytest.mark.usefixtures("torch_alone")

CASES = {
    "llama": (FusionConfig("mbtf_stf"), "clip", "llama, full"),
    "llama, tied": (FusionConfig("avg_pool"), "siglip", "llama, tied"),
    "llama-3": (FusionConfig("mlp"), "clip", "llama-3"),
    "mistral": (FusionConfig("mlp"), "siglip", "llama, full"),
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
        ours = make(root / "ours", *CASES[case])
        export_hf(ours, root / "hf")
        if case == "mistral":  # ours are exported as Llama's, which has the same tensors
            rewrite(root / "hf" / "config.json", text_config={"model_type": "mistral", "sliding_window": None})
        return ours, root / "hf"

    return get


def rewrite(file, **changes):
    """Changes keys of a JSON file; of an object in it, its keys. None takes a key away."""
    values = json.loads(file.read_text())
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) else change
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# Of unequal length, about no, one or two images, which are of the tower's size: so both prepare the same squares.
ASKED = [
    (
        "Which " + "very " * (3 * i % 7) + f"odd thing is number {i}?",
        [make_image(9 * i + j, (36, 36)) for j in range(shown)],
    )
    for i, shown in enumerate((1, 0, 2, 1, 2, 0))
]


@functools.cache
def ours(folder):
    """Tokens that our generator says to each question, int [G], of which those after a stop mean nothing."""
    generator, _ = load_generator(epath.Path(folder), make_mesh(MeshConfig(1, 1, 1)), "float32")
    generator._text = np.ndarray.tolist  # the tokens in place of the text
    records = [
        Record("asked", tuple(p.copy for p in shown), (Turn("human", "<image>\n" * len(shown) + text),))
        for text, shown in ASKED
    ]
    return list(generator.answers(records, LIMIT, rows=len(ASKED)))


def theirs(folder):
    """The same of an export in PyTorch, all questions in one batch, as transformers fills it up."""
    model, processor = load(folder)
    texts = [
        processor.apply_chat_template([turn(text, *shown)], add_generation_prompt=True, tokenize=False)
        for text, shown in ASKED
    ]
    flat = [one for _, shown in ASKED for one in shown]
    inputs = processor(text=texts, images=flat, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
    return model, said[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_an_export_answers_here_as_in_pytorch(folders, case):
    _, export = folders(case)
    model, said = theirs(export)
    assert type(model.model.language_model).__name__.lower().startswith(case[:5])
    assert [len(answer) for answer in said] == [LIMIT] * len(ASKED)
    assert len({tuple(answer) for answer in said}) == len(ASKED)  # images and prompts matter, or it says little
    assert ours(export) == said


def test_answers_end_and_are_worded_alike(tmp_path):
    """By whichever token ends an answer in the template or the tokenizer; by words that some text has trained."""
    folder = make(tmp_path / "ours", FusionConfig("stf"), "clip", "llama", template="chatml")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.save_pretrained(folder / "tokenizer")
    export_hf(folder, tmp_path / "hf")
    stop, end, mark = (*tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]), len(tokenizer))
    values = load_file(tmp_path / "hf" / "model.safetensors")
    head = values["lm_head.weight"]
    head[stop] *= 2.2
    head[end] = 0.8 * head[100] + 0.8 * head[200]
    head[mark:] = 4 * head[: len(head) - mark]  # <image>, and rows beyond it: nothing else would be said
    save_file(values, tmp_path / "hf" / "model.safetensors", {"format": "pt"})

    def until_stop(answers, filling):
        for answer in answers:
            said = next((answer[: i + 1] for i, token in enumerate(answer) if token in (stop, end)), answer)
            assert set(answer[len(said) :]) <= {filling}  # it did end there
            yield said

    said = list(until_stop(theirs(tmp_path / "hf")[1], tokenizer.pad_token_id))
    assert list(until_stop(ours(tmp_path / "hf"), stop)) == said
    assert {answer[-1] for answer in said if len(answer) < LIMIT} == {stop, end}
    assert max(map(len, said)) == LIMIT
    assert max(max(answer) for answer in said) < mark


@pytest.mark.parametrize("case", CASES)
def test_an_export_holds_the_same_parameters_to_the_bit(folders, case):
    start, export = folders(case)
    before, after = open_model(start), open_model(export)
    assert after.shapes == before.shapes
    for path in before.shapes:
        assert before.read(path).tobytes() == after.read(path).tobytes(), path
    assert after.step is None
    for part in ("vision", "llm", "template", "aspect"):
        assert getattr(after.description, part) == getattr(before.description, part)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_exports_keep_halves_and_lie_on_a_mesh_as_wanted(folders, tmp_path, dtype):
    start, _ = folders("qwen2")
    export_hf(start, tmp_path / "hf", dtype)
    before, after = open_model(start), open_model(epath.Path(tmp_path / "hf"))
    places = blueprint(after.config).shardings(make_mesh(MeshConfig(1, 4, 2)))
    seen = []
    for path, value in after.restore(places):
        assert after.shapes[path] == jax.ShapeDtypeStruct(value.shape, value.dtype)
        assert value.dtype.name == dtype
        assert value.sharding == places[path]
        np.testing.assert_array_equal(np.asarray(value), before.read(path).astype(value.dtype))
        seen.append(path)
    assert seen == list(places)
    assert set(seen) == set(before.shapes)


def test_a_run_its_export_and_that_imported_answer_alike(folders, tmp_path):
    start, export = folders("llama")
    run = make_run(epath.Path(tmp_path / "run"), start, step=7)
    export_hf(run, epath.Path(tmp_path / "hf"))
    import_weights(str(tmp_path / "hf"), epath.Path(tmp_path / "again"))
    opened = {name: open_model(epath.Path(tmp_path / name)) for name in ("run", "hf", "again")}
    assert {name: saved.step for name, saved in opened.items()} == {"run": 7, "hf": None, "again": None}
    for file in ("config.json", "model.safetensors"):  # so its answers are known
        assert (tmp_path / "hf" / file).read_bytes() == (export / file).read_bytes()
    said = ours(export)
    assert ours(run) == said
    assert ours(tmp_path / "again") == said


def test_of_two_exports_at_one_path_each_is_seen_as_it_is(folders, tmp_path):
    """Nothing of the first stays in the process: neither its shapes nor an entry in a table of presets."""
    before = dict(presets.VISION), dict(presets.LLM)
    place = epath.Path(tmp_path / "hf")
    for case in ("llama", "llama-3", "qwen2"):  # other fusions, and language models of other kinds
        start, export = folders(case)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(export, place)
        saved = open_model(place)
        assert saved.description.llm == saved.config.llm_shape == open_model(start).description.llm
        assert saved.description.vision == saved.config.vision_shape == open_model(start).description.vision
        assert (saved.config.vision, saved.config.llm) == (str(place), str(place))
        assert {path: leaf.shape for path, leaf in blueprint(saved.config).shapes.items()} == {
            path: leaf.shape for path, leaf in saved.shapes.items()
        }
    assert dict(presets.VISION) == before[0]
    assert dict(presets.LLM) == before[1]


def test_an_export_for_the_authors_code_is_opened_too(llama, tmp_path, monkeypatch):
    """Its tower is told by its tensors; its tokenizer is the SentencePiece file alone."""
    shape = dict(image_size=28, patch_size=7, width=64, layers=24, heads=1, mlp=32)
    monkeypatch.setitem(TOWERS, "deep", dataclasses.replace(VISION["clip-l-14-336"], **shape))
    monkeypatch.setitem(DECODERS, "wide", dataclasses.replace(LLAMA, vocab=32_000, norm_eps=1e-5))
    taps = (23, 21, 18, 15, 12, 9, 6, 3)
    start = make(epath.Path(tmp_path / "start"), FusionConfig(taps=taps), "deep", "wide", aspect="pad")
    shutil.rmtree(start / "tokenizer")
    shutil.copytree(llama.name_or_path, start / "tokenizer")
    theirs = epath.Path(tmp_path / "theirs")
    export_llava_stf(start, theirs)
    assert not (theirs / "tokenizer.json").exists()
    generator, after = load_generator(theirs, make_mesh(MeshConfig(1, 1, 1)))
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


def test_precision_is_the_runs_own_unless_told(folders, tmp_path):
    start, export = folders("llama, tied")
    run = make_run(epath.Path(tmp_path / "run"), start, step=1)  # in float32
    mesh = make_mesh(MeshConfig(1, 1, 1))
    wanted = {(run, ""): "float32", (run, "bfloat16"): "bfloat16", (export, ""): "bfloat16", (start, ""): "bfloat16"}
    for (folder, precision), expected in wanted.items():
        generator, _ = load_generator(folder, mesh, precision)
        assert {x.dtype.name for x in jax.tree.leaves(generator._weights)} == {expected}


@pytest.mark.parametrize("kind", ["imported", "run", "export"])
def test_no_more_is_held_than_the_model_and_one_parameter(folders, tmp_path, kind):
    start, export = folders("qwen2")
    if kind == "run":
        start = make_run(epath.Path(tmp_path / "run"), start, step=1)
    folder = export if kind == "export" else start
    mesh = make_mesh(MeshConfig(1, 1, 1))
    generator, saved = load_generator(folder, mesh, "float32")
    generator.take([])
    before, taken = held(), 0

    def watched():
        nonlocal taken
        for path, x in saved.restore(generator.plan.shardings(mesh)):
            assert held() - before <= taken + x.nbytes, path
            taken += x.nbytes
            yield path, x
            del x

    generator.take(watched())
    assert held() - before == taken == sum(leaf.size * 4 for leaf in saved.shapes.values())


def held():
    """Bytes of all arrays that are alive; what shares memory counts twice."""
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.usefixtures("optimized")
def test_taking_a_parameter_apart_gathers_it_nowhere():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    places = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    stack = jax.ShapeDtypeStruct((8, 256, 128), jnp.bfloat16, sharding=places)
    place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    program = decoding._taken(jnp.dtype(jnp.bfloat16), place, True).lower(stack).compile()
    assert "all-gather" not in program.as_text()
    # On a CPU a checksum's terms, of twice the size, are written down before they are added.
    assert program.memory_analysis().temp_size_in_bytes < 3.1 * (8 * 256 * 128 * 2 / 8)


# ---- What cannot be opened -------------------------------------------------------------------------------------------


def without(name):
    def change(folder):
        file = folder / "model.safetensors"
        values = load_file(file)
        del values[name]
        save_file(values, file, {"format": "pt"})

    return change


def cut_short(folder):
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
        "{folder} is not a whole model: it lacks tokenizer.",
    ),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "{folder}/config.json is not JSON"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "config.json should hold a JSON object"),
    "a tensor is missing": (
        without("model.language_model.layers.1.mlp.up_proj.weight"),
        "model.language_model.layers.1.mlp.up_proj.weight (48, 32) is missing",
    ),
    "no projector": (without("model.mm_projector.0.weight"), "mm_projector.0.weight"),
    "cut short": (cut_short, "model.safetensors cannot be read as safetensors"),
    "another tokenizer": (another_vocabulary, "The tokenizer's 522 tokens exceed the 501 of {folder}."),
    "more layers": (config(text_config={"num_hidden_layers": 4}), "num_hidden_layers 4, but the tensors hold 3 layers"),
    "no such template": (config(conversation_template="v2"), "Unknown data.template='v2'"),
    "a template of templates": (config(conversation_template=["v1"]), "Unknown data.template=\"['v1']\""),
    "no patches": (config(vision_config={"patch_size": 0}), "{folder}: Vision tower with images of 36 pixels"),
    "words for taps": (
        config(stf_config={"taps": "4321"}),
        "config.json does not describe an export of ours",
    ),
    "no window": (config(stf_config={"kernel": 0}), "config.json does not describe an export of ours"),
    "no end of blocks": (config(stf_config={"depth": 10**7}), "config.json does not describe an export of ours"),
    "fewer than none": (config(stf_config={"depth": -1}), "config.json does not describe an export of ours"),
    "one mean": (
        lambda folder: rewrite(folder / "preprocessor_config.json", image_mean=0.5),
        "{folder}: The image processor's image_mean is 0.5, not three numbers.",
    ),
}


def refused(folder):
    with pytest.raises(UserError) as error:
        load_generator(folder, make_mesh(MeshConfig(1, 1, 1)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_is_told_in_a_sentence(folders, tmp_path, damage):
    folder = epath.Path(shutil.copytree(folders("llama")[1], tmp_path / "hf"))
    change, says = DAMAGES[damage]
    change(folder)
    assert says.format(folder=folder) in refused(folder)


def test_parts_are_no_model(tmp_path):
    parts = {"vision, fusion": decoder("llama"), "fusion, llm": tower("clip")}
    for lacking, model in parts.items():
        folder = epath.Path(tmp_path / lacking)
        model.save_pretrained(folder)
        assert refused(folder) == f"{folder} is not a whole model: it lacks {lacking}, tokenizer."


def test_what_is_no_model_is_told_in_a_sentence(folders, tmp_path):
    start, _ = folders("llama")
    neither = "is neither the workdir of a run (it has no checkpoints/), nor imported weights, nor an export."
    (tmp_path / "file").write_text("text")
    for name in ("nowhere", "file", "."):
        folder = epath.Path(tmp_path / name)
        assert refused(folder) == f"{folder} {neither}"
    native = epath.Path(tmp_path / "native")
    export_native(start, native)
    assert refused(native) == f"{native} {neither}"
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert "holds no complete checkpoint" in refused(epath.Path(tmp_path / "new"))
    for content in ("{", "[]", "{}", '{"vision": 3}'):
        folder = epath.Path(shutil.copytree(start, tmp_path / "imported", dirs_exist_ok=True))
        (folder / "model.json").write_text(content)
        told = "/model.json is not JSON: " if content == "{" else " does not say what model it holds: "
        assert refused(folder).startswith(f"{folder}{told}")
    shutil.copy(start / "model.json", folder)
    shutil.rmtree(folder / "tokenizer")
    copy = f"Copy the folder of its tokenizer to {folder}/tokenizer."
    assert refused(folder) == f"{folder} is not a whole model: it lacks tokenizer. {copy}"
    run = make_run(epath.Path(tmp_path / "run"), start, step=1)
    rewrite(run / "config.json", model={"llm": "llama-9"})
    assert "model.llm='llama-9'" in refused(run)
