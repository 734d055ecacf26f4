"""Imports of folders as they are published: with extra files, old configs and old names."""

import functools
import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from reference import TEXT, VISION, decoder, llava, tower
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.convert import main
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.decoders.base import RopeScaling
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model


def write(folder, state, config, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        torch.save(dict(state), folder / name)
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def llama():
    """State dict and config, as plain data, of a small Llama."""
    return dict(decoder("llama").state_dict()), decoder("llama").config.to_dict()


def write_shards(folder, state, ending):
    """Writes the state in two files with an index; returns the map from tensor to file."""
    names, stem = sorted(state), {"bin": "pytorch_model", "safetensors": "model"}[ending]
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        name = f"{stem}-0000{i + 1}-of-00002.{ending}"
        write(folder, {key: state[key] for key in part}, llama()[1], name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


# ---- Extra files -----------------------------------------------------------------------------------------------------


def test_extra_files_beside_pickles_are_ignored(tmp_path):
    """LLaVA-1.5's folder also has the projector of its first stage; trainers save their own state."""
    source = tmp_path / "source"
    write_shards(source, llama()[0], "bin")
    for name in ("mm_projector.bin", "scheduler.bin", "training_args.bin"):
        torch.save({"model.norm.weight": torch.zeros(3)}, source / name)
    report = import_weights(str(source), tmp_path / "imported")
    assert sorted(report["read"]) == sorted(llama()[0])


@pytest.mark.parametrize("index", [True, False])
def test_extra_files_beside_safetensors_are_ignored(tmp_path, index):
    """Mistral's folder has the weights again under other names; adapters may be in the folder of their model."""
    source = tmp_path / "source"
    if index:
        write_shards(source, llama()[0], "safetensors")
    else:
        write(source, *llama())
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"):
        save_file({"layers.0.attention.wk.weight": torch.zeros(3)}, source / name)
    report = import_weights(str(source), tmp_path / "imported")
    assert sorted(report["read"]) == sorted(llama()[0])


def test_an_index_may_only_list_files_in_its_folder(tmp_path):
    source = tmp_path / "source"
    weight_map = write_shards(source, llama()[0], "safetensors")
    index = source / "model.safetensors.index.json"
    for wrong in ("../secret.safetensors", "/etc/passwd", "absent.safetensors"):
        index.write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": wrong}}))
        with pytest.raises(UserError, match=r"which is (missing|not a file in its folder)"):
            import_weights(str(source), tmp_path / "imported")
    for wrong in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{"):
        index.write_text(wrong)
        with pytest.raises(UserError, match=r"index\.json is not an index of weights"):
            import_weights(str(source), tmp_path / "imported")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointers_are_refused(tmp_path, name):
    source = write(tmp_path / "source", *llama())
    (source / "model.safetensors").unlink()
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        import_weights(str(source), tmp_path / "imported")


def test_old_configs_and_pickles_are_imported(tmp_path):
    """Like Vicuna-7B-16k: rotary scaling by ``type``, a separate theta, and stored frequencies and position ids."""
    state, config = llama()
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "head_dim")}
    old |= {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 5e4, "torch_dtype": "float16"}
    state = state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write(tmp_path / "source", state, old, "pytorch_model.bin")
    import_weights(str(tmp_path / "source"), tmp_path / "imported")
    llm = open_model(tmp_path / "imported").description.llm
    assert (llm.rope_theta, llm.rope_scaling) == (5e4, RopeScaling("linear", 4.0))

    state = {f"vision_model.{key.removeprefix('vision_model.')}": v for key, v in tower("clip").state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write(tmp_path / "tower", state, tower("clip").config.to_dict(), "pytorch_model.bin")
    report = import_weights(str(tmp_path / "tower"), tmp_path / "imported tower")
    assert report["unused"]["vision_model.embeddings.position_ids"] == "counted"


def test_means_are_read_from_the_processors_config(tmp_path):
    tower("clip").save_pretrained(tmp_path / "source")
    values = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}}
    (tmp_path / "source" / "processor_config.json").write_text(json.dumps(values))
    import_weights(str(tmp_path / "source"), tmp_path / "imported")
    vision = open_model(tmp_path / "imported").description.vision
    assert (vision.mean, vision.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("kind", ["llama", "llava", "llava_llama", "mistral"])
@pytest.mark.parametrize("config", [True, False])
def test_a_sentencepiece_model_is_read_independently_of_other_files(
    request, sentencepiece_model, tmp_path, kind, config
):
    """transformers decides by model_type, and drops the space before a text for some."""
    if config:
        shutil.copytree(request.getfixturevalue("llama").name_or_path, tmp_path / "folder")
    else:
        (tmp_path / "folder").mkdir()
        shutil.copy(sentencepiece_model, tmp_path / "folder" / "tokenizer.model")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": kind}))
    text = "USER: What is it?\nASSISTANT: a cat"
    reference = sentencepiece.SentencePieceProcessor(str(sentencepiece_model))
    assert load_tokenizer(str(tmp_path / "folder"))(text).input_ids == [reference.bos_id(), *reference.encode(text)]


# ---- Configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_either_key_of_a_composite_config_ties_the_head(tmp_path, inner, outer, stored):
    text = LlamaConfig(**TEXT, tie_word_embeddings=inner)
    config = LlavaConfig(vision_config=tower("clip").config, text_config=text, image_token_index=60)
    state = dict(llava().state_dict())
    if not stored:
        state = {key: value for key, value in state.items() if "lm_head" not in key}
    write(tmp_path / "source", state, config.to_dict() | {"tie_word_embeddings": outer})
    if not (stored or inner or outer):
        with pytest.raises(UserError, match=r"lm_head\.weight .* is missing"):
            import_weights(str(tmp_path / "source"), tmp_path / "imported")
        return
    import_weights(str(tmp_path / "source"), tmp_path / "imported")
    tied = open_model(tmp_path / "imported").description.llm.tied
    assert tied is not stored  # the stored head has other values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("projector_hidden_act", "relu"),
        ("vision_feature_select_strategy", "full"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_projector_type", "linear"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_use_im_start_end", True),
        ("image_aspect_ratio", "anyres_max_9"),
    ],
)
def test_unsupported_fusion_options_are_refused(tmp_path, key, value):
    config = llava().config.to_dict() | {key: value}
    write(tmp_path / "source", llava().state_dict(), config)
    with pytest.raises(UserError, match=f"says {key} {value!r}"):
        import_weights(str(tmp_path / "source"), tmp_path / "imported")


def test_an_adapter_of_another_tap_needs_its_tower(tmp_path):
    shapes = {"0.weight": (8, 64), "0.bias": (8,), "2.weight": (8, 8), "2.bias": (8,)}
    state = {f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    write(tmp_path / "source", state, {"mm_hidden_size": 64, "mm_vision_select_layer": -1}, "mm_projector.bin")
    with pytest.raises(UserError, match="deepest tap is layer -1"):
        import_weights(str(tmp_path / "source" / "mm_projector.bin"), tmp_path / "imported")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"hidden_size": 32.5},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5, "head_dim": None},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**7},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "much"}},
        {"text_config": 3},
        {"model_type": ["llama"]},
        {"model_type": "llava_stf"},
        {"model_type": "llava_stf", "stf_config": {"fusion": "nonsense", "taps": [1]}},
        {"dtype": "nonsense"},
    ],
    ids=str,
)
def test_invalid_config_values_are_refused(tmp_path, change, capsys):
    state, config = llama()
    write(tmp_path / "source", state, config | change)
    assert run_command(main, ["import", str(tmp_path / "source"), f"--to={tmp_path / 'imported'}"]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", ()),
        ("model.mm_projector.0.weight", (8,)),
        ("embeddings.patch_embedding.weight", (4, 3)),
        ("model.mm_projector_crosslayer.2.weight", (4, 4)),
    ],
)
def test_invalid_shapes_are_refused(tmp_path, name, shape, capsys):
    state = llama()[0] | {
        "model.mm_projector.0.weight": torch.zeros(8, 8),
        "model.mm_projector.2.weight": torch.zeros(8, 8),
    }
    state |= {"embeddings.class_embedding": torch.zeros(4), name: torch.zeros(shape)}
    write(tmp_path / "source", state, llama()[1])
    assert run_command(main, ["import", str(tmp_path / "source"), f"--to={tmp_path / 'imported'}"]) == 2
    assert "Tensor" in capsys.readouterr().err


# ---- Target folders and damaged imports ------------------------------------------------------------------------------


def test_failed_imports_keep_existing_files(tmp_path, monkeypatch, capsys):
    write(tmp_path / "source", *llama())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "imported.partial").mkdir()
    (tmp_path / "imported.partial" / "mine").write_text("mine")
    assert run_command(main, ["import", str(tmp_path / "source"), f"--to={tmp_path / 'file' / 'x'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run_command(main, ["import", str(tmp_path / "source"), f"--to={tmp_path / 'imported'}"]) == 0
    assert (tmp_path / "imported.partial" / "mine").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_command(main, ["import", str(tmp_path / "source"), "--to=."]) == 0
    assert open_model(tmp_path / "here").description == open_model(tmp_path / "imported").description


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("cut", [True, False])
def test_errors_name_a_damaged_import(tmp_path, file, cut, capsys):
    write(tmp_path / "source", *llama())
    import_weights(str(tmp_path / "source"), tmp_path / "imported")
    (found,) = (tmp_path / "imported" / "params" / "state").glob(file)
    if cut:
        found.write_bytes(found.read_bytes()[:10])
    else:
        found.unlink()
    capsys.readouterr()
    assert run_command(main, ["export", str(tmp_path / "imported"), "--format=native", f"--to={tmp_path / 'out'}"]) == 2
    assert str(tmp_path / "imported") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_saved_by_transformers_are_imported(tmp_path):
    """LlavaForConditionalGeneration.save_pretrained writes transformers 5's names."""
    llava().save_pretrained(tmp_path / "source")
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "source")
    import_weights(str(tmp_path / "source"), tmp_path / "imported")
    saved = open_model(tmp_path / "imported")
    embedding = reloaded.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(saved.read("llm/embedding"), embedding)
    assert saved.description.vision.layers == VISION["num_hidden_layers"]
    assert load_file(tmp_path / "source" / "model.safetensors")
