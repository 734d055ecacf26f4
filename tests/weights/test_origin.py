"""Runs start from one path with tower, language model and tokenizer, and remain usable when it is deleted."""

import dataclasses
import json
import shutil

import jax
import pytest
from etils import epath
from make_models import DECODERS, TOWERS, make, make_image, make_run

from stf_jax import chat
from stf_jax.checkpointing.params import write_params
from stf_jax.cli import run_command
from stf_jax.config import DataConfig, FusionConfig, MeshConfig, ModelConfig, TrainConfig, UserError, from_json, to_json
from stf_jax.data.records import BadRow, Record, Turn
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.inference.generator import Generator
from stf_jax.inference.loading import load_generator
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.mesh import make_mesh
from stf_jax.weights.folder import load_params
from stf_jax.weights.model import Description, open_model, save_description
from stf_jax.weights.origin import complete_config


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder of random weights, as an import writes it."""
    return make(epath.Path(tmp_path_factory.mktemp("imported")) / "W", FusionConfig("stf"), "clip", "qwen2")


def make_described_run(folder, start):
    """Makes a run that started from ``start``, with the files that training writes beside its checkpoint."""
    run = make_run(folder, start, step=2)
    config = complete_config(from_json(json.loads((run / "config.json").read_text())), run)
    save_description(run, config, load_tokenizer(config.data.tokenizer))
    return run


# ---- Completing a config ---------------------------------------------------------------------------------------------


def test_init_from_gives_tower_language_model_and_tokenizer(imported, tmp_path):
    found = complete_config(TrainConfig(init_from=str(imported)), tmp_path / "new")
    assert (found.model.vision, found.model.llm) == (str(imported), str(imported))
    assert (found.model.vision_shape, found.model.llm_shape) == (TOWERS["clip"], DECODERS["qwen2"])
    assert found.data.tokenizer == str(imported / "tokenizer")
    # Template and aspect depend on the stage, as in LLaVA's scripts, so they keep their defaults.
    assert (found.data.template, found.data.aspect) == (DataConfig().template, DataConfig().aspect)
    # Only the names are saved; reading them back gives the same config.
    reread = from_json(json.loads(json.dumps(to_json(found))))
    assert complete_config(reread, tmp_path / "new") == found


def test_the_default_is_the_papers_model(tmp_path):
    found = complete_config(TrainConfig(), tmp_path)
    assert (found.model.vision, found.model.llm, found.data.tokenizer) == ("clip-l-14-336", "vicuna-7b", "")
    assert blueprint(found.model).shapes == blueprint(ModelConfig()).shapes


@pytest.mark.parametrize(
    ("source", "vision", "llm", "tokenizer"),
    [
        ("miniatures/siglip", "siglip-mini-16-96", "llama-mini", "miniature"),
        ("miniatures/2", "clip-mini-8-96", "llama-mini-6", "miniature/2"),
    ],
)
def test_embedded_weights_complete_a_config(source, vision, llm, tokenizer):
    found = complete_config(TrainConfig(init_from=source))
    assert (found.model.vision, found.model.llm) == (vision, llm)
    assert found.data.tokenizer == tokenizer


def test_configured_values_win_and_later_folders_win(imported, tmp_path):
    tower = epath.Path(tmp_path / "tower")
    tower.mkdir()
    Description(TOWERS["siglip"], None, None).save(tower)
    (tower / "params" / "state").mkdir(parents=True)
    config = TrainConfig(init_from=f"{imported}, {tower}", model=ModelConfig(llm="vicuna-13b"))
    found = complete_config(dataclasses.replace(config, data=DataConfig(tokenizer="miniature")))
    assert (found.model.vision, found.model.vision_shape) == (str(tower), TOWERS["siglip"])
    assert (found.model.llm, found.model.llm_shape.layers) == ("vicuna-13b", 40)
    assert found.data.tokenizer == "miniature"


def test_a_run_completes_a_config_with_and_without_its_source(imported, tmp_path):
    start = epath.Path(tmp_path / "W")
    shutil.copytree(imported, start)
    run = make_described_run(epath.Path(tmp_path / "run"), start)
    for folder in (start / "tokenizer", run / "tokenizer"):
        found = complete_config(TrainConfig(init_from=str(run)), tmp_path / "stage2")
        assert (found.model.vision_shape, found.model.llm_shape) == (TOWERS["clip"], DECODERS["qwen2"])
        assert found.data.tokenizer == str(folder)
        # The run resumes with the same command, with no names, or with the folder's new name.
        for model in (ModelConfig(), ModelConfig(str(start), str(start)), ModelConfig(str(imported), str(imported))):
            config = TrainConfig(init_from=str(start), model=model, data=DataConfig(tokenizer=str(start / "tokenizer")))
            resumed = complete_config(config, run)
            assert (resumed.model.vision, resumed.model.llm) == (str(start), str(start))
            assert resumed.model.llm_shape == DECODERS["qwen2"]
            assert resumed.data.tokenizer == str(folder)
        shutil.rmtree(start, ignore_errors=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"llm": "llama-mini"}, "model.llm is a different model (set model.llm={W}, or leave it out): "),
        ({"vision": "clip-mini-16-96"}, "model.vision is a different model (set model.vision={W}, or leave it out): "),
        ({"fusion": FusionConfig("mlp")}, "model.fusion differs from the one that {W} was trained with"),
    ],
)
def test_errors_name_the_config_key_to_change(imported, changes, sentence):
    mesh = make_mesh(MeshConfig(1, 1, 1))
    values = {"vision": str(imported), "llm": str(imported), "fusion": FusionConfig("stf")}
    plan = blueprint(ModelConfig(**values | changes))
    shardings = plan.shardings(mesh)
    layout = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in plan.shapes.items()}
    with pytest.raises(UserError) as raised:
        load_params(str(imported), layout, ())
    assert sentence.format(W=imported) in str(raised.value)
    assert "init_missing" not in str(raised.value)


# ---- Runs are self-contained -----------------------------------------------------------------------------------------


def test_a_moved_run_is_opened_without_its_source(imported, tmp_path):
    start = epath.Path(tmp_path / "W")
    shutil.copytree(imported, start)
    run = make_described_run(epath.Path(tmp_path / "run"), start)
    before = open_model(run)
    text = "USER: What  is <image>\n it?"
    ids = load_tokenizer(str(before.tokenizer))(text).input_ids
    moved = epath.Path(tmp_path / "elsewhere" / "run")
    moved.parent.mkdir()
    shutil.move(run, moved)
    shutil.rmtree(start)
    after = open_model(moved)
    assert (after.description, after.config, after.step) == (before.description, before.config, 2)
    assert after.tokenizer == moved / "tokenizer"
    assert load_tokenizer(str(after.tokenizer))(text).input_ids == ids
    generator, _ = load_generator(moved, make_mesh(MeshConfig(1, 1, 1)))
    assert generator.slots == 9


def test_an_old_run_names_its_missing_files_and_their_paths(imported, tmp_path):
    start = epath.Path(tmp_path / "W")
    shutil.copytree(imported, start)
    run = make_run(epath.Path(tmp_path / "run"), start, step=2)  # with config.json and checkpoints alone
    assert open_model(run).description.llm == DECODERS["qwen2"]
    shutil.move(start, tmp_path / "again")
    with pytest.raises(UserError, match=r"is from before runs saved their shapes.* to .*/run/model\.json\."):
        open_model(run)
    shutil.copy(tmp_path / "again" / "model.json", run / "model.json")
    assert open_model(run).description.llm == DECODERS["qwen2"]
    with pytest.raises(UserError, match=r"it lacks tokenizer\. Copy the folder of its tokenizer to .*/run/tokenizer\."):
        load_generator(run, make_mesh(MeshConfig(1, 1, 1)))
    shutil.copytree(tmp_path / "again" / "tokenizer", run / "tokenizer")
    load_generator(run, make_mesh(MeshConfig(1, 1, 1)))


# ---- A tokenizer with more tokens than rows --------------------------------------------------------------------------


@pytest.fixture
def extended_tokenizer():
    """The miniature tokenizer with an extra special token and an extra word beyond its vocabulary of 501."""
    tokenizer = load_tokenizer("miniature")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["zzyzx"])
    return tokenizer


def test_tokens_beyond_the_rows_are_neither_generated_nor_encoded(extended_tokenizer):
    model = resolve_model(ModelConfig("clip-mini-16-96", "llama-mini", FusionConfig("mlp"), remat="none"))
    model = dataclasses.replace(model, llm_shape=dataclasses.replace(model.llm_shape, vocab=501))
    assert extended_tokenizer.convert_tokens_to_ids(["<pad>", "zzyzx"]) == [501, 502]
    generator = Generator(model, extended_tokenizer, make_mesh(MeshConfig(1, 1, 1)), "v1", "pad")

    def prompt_length(text):
        return len(generator.prompt(Record("r", (), (Turn("human", text),))).tokens)

    assert prompt_length("What is <pad> here?") > 20  # encoded as plain text, letter by letter
    with pytest.raises(BadRow, match=r"'r' contains the token zzyzx \(id 502\).* 501 rows"):
        prompt_length("What is zzyzx?")
    smaller = dataclasses.replace(model, llm_shape=dataclasses.replace(model.llm_shape, vocab=500))
    with pytest.raises(UserError, match="503 tokens exceed the 500"):  # a token of the original vocabulary
        Generator(smaller, extended_tokenizer, make_mesh(MeshConfig(1, 1, 1)), "v1", "pad")
    extended_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(UserError, match=r"'chatml' needs the token <\|im_start\|> \(id 503\)"):
        Generator(model, extended_tokenizer, make_mesh(MeshConfig(1, 1, 1)), "chatml", "pad")


# ---- A language model alone ------------------------------------------------------------------------------------------


def test_a_language_model_alone_chats_in_text(imported, tmp_path, capsys):
    alone = epath.Path(tmp_path / "alone")
    alone.mkdir()
    saved = open_model(imported)
    write_params(alone, ((path, saved.read(path)) for path in saved.shapes if path.startswith("llm/")))
    Description(None, saved.description.llm, None).save(alone)
    shutil.copytree(imported / "tokenizer", alone / "tokenizer")
    options = ["--prompt=What is red?", "--max-new-tokens=8", "--precision=float32"]
    assert run_command(chat.main, [f"--checkpoint={imported}", *options]) == 0
    expected = capsys.readouterr().out
    assert len(expected) > 8
    assert run_command(chat.main, [f"--checkpoint={alone}", *options]) == 0
    assert capsys.readouterr().out == expected  # the complete model's answer without an image
    make_image(1).save(tmp_path / "a.png")
    assert run_command(chat.main, [f"--checkpoint={alone}", *options, f"--image={tmp_path / 'a.png'}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: This image cannot be used: the model has no vision tower" in err
    with pytest.raises(UserError, match="is not a complete model: it lacks vision, fusion"):
        load_generator(alone, make_mesh(MeshConfig(1, 1, 1)))
