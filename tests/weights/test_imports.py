"""Imports of checkpoints from transformers, LLaVA and LLaVA-STF, compared with the original models."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
from reference import (
    DECODERS,
    TEXT,
    VISION,
    decoder,
    llava,
    normalize,
    to_hub_names,
    to_original_names,
    tower,
    write,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from stf_jax.cli import run_command
from stf_jax.config import FusionConfig, MeshConfig, ModelConfig, UserError
from stf_jax.convert import main
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import llm_preset, vision_preset
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.weights.detect import detect_model
from stf_jax.weights.folder import load_params
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model
from stf_jax.weights.tensors import Entry, TensorFile

MESHES = [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)]


def load_model(folder, mesh=MESHES[0], scan=True):
    """Returns our model with the weights of an imported folder, and its mesh."""
    description = open_model(folder).description
    model = ModelConfig(
        str(folder), str(folder), description.fusion or FusionConfig("mlp"), precision="float32", remat="none",
        scan_layers=scan,
    )  # fmt: skip
    plan, mesh = blueprint(model), make_mesh(mesh)
    layout = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan.shardings(mesh)[path])
        for path, leaf in plan.shapes.items()
    }
    missing = () if description.fusion else ("fusion/.*",)
    params = load_params(str(folder), layout, missing)
    for path, value in params.items():
        assert value.sharding == layout[path].sharding
    blank = {path: jnp.zeros(leaf.shape) for path, leaf in plan.shapes.items() if path not in params}
    return plan.merge({path: value.astype(jnp.float32) for path, value in params.items()} | blank), mesh


def tokens(vocab=60, rows=2, length=12):
    return np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)


def our_logits(model, mesh, ids, images=None, slots=None):
    # Rows are repeated, because all meshes here must divide them.
    ids, images, slots = (None if x is None else jnp.concatenate([x, x]) for x in (ids, images, slots))

    @jax.jit
    def run(ids):
        x = (
            model.embed(ids, slots, model.image_tokens(images))
            if images is not None
            else model.llm.embed(ids, jnp.float32)
        )
        return model.llm.logits(model.llm(x, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), None))

    with compute_context(mesh, "float32"):
        return np.asarray(run(ids))[: len(ids) // 2]


def make_images(rows=2):
    return np.random.default_rng(3).integers(0, 256, (rows, 28, 28, 3), np.uint8)


# ---- Language models and towers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_logits_of_language_models_match(family, tmp_path):
    decoder(family).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    tower("clip").save_pretrained(tmp_path / "tower")
    folder = tmp_path / "imported"
    report = import_weights(str(tmp_path / "source"), folder, str(tmp_path / "tower"))
    assert report["model"]["llm"]["vocab"] == 62
    with torch.no_grad():
        expected = decoder(family)(torch.from_numpy(tokens()).long()).logits.numpy()
    # Meshes and scans treat the layers of all families alike: one family is enough for all combinations.
    all_pairs, pairs = itertools.product(MESHES, (True, False)), zip(MESHES, (True, False), strict=True)
    for mesh, scan in all_pairs if family == "llama" else pairs:
        actual = our_logits(*load_model(folder, mesh, scan), tokens())
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "mesh", "scan"),
    [*itertools.product(["clip"], MESHES, (True, False)), ("siglip", MESHES[0], True), ("siglip", MESHES[1], False)],
    ids=str,
)
def test_all_hidden_states_of_towers_match(family, mesh, scan, tmp_path):
    tower(family).save_pretrained(tmp_path / "source")
    decoder("llama").save_pretrained(tmp_path / "llm")
    import_weights(str(tmp_path / "llm"), tmp_path / "imported", str(tmp_path / "source"))
    model, mesh = load_model(tmp_path / "imported", mesh, scan)
    with torch.no_grad():
        states = tower(family)(normalize(make_images(4), family), output_hidden_states=True).hidden_states
    with compute_context(mesh, "float32"):
        actual = jax.jit(lambda images: model.vision(images, (4, 3, 2, 1, 0), jnp.float32))(make_images(4))
    for depth, state in zip((4, 3, 2, 1, 0), actual, strict=True):
        np.testing.assert_allclose(state, states[depth][:, int(family == "clip") :].numpy(), atol=1e-4)


def test_a_tower_is_imported_with_and_without_its_text_model(tmp_path):
    both = CLIPModel(CLIPConfig(vision_config=CLIPVisionConfig(**VISION), text_config=CLIPTextConfig(vocab_size=50)))
    both.vision_model.load_state_dict(
        {name.removeprefix("vision_model."): value for name, value in tower("clip").state_dict().items()}
    )
    both.save_pretrained(tmp_path / "both")
    tower("clip").save_pretrained(tmp_path / "alone")
    reports = [import_weights(str(tmp_path / name), tmp_path / f"{name}-imported") for name in ("both", "alone")]
    assert reports[0]["model"] == reports[1]["model"]
    assert "the text tower's" in reports[0]["unused"].values()
    first, second = (open_model(tmp_path / f"{name}-imported") for name in ("both", "alone"))
    assert first.shapes == second.shapes
    for path in first.shapes:
        np.testing.assert_array_equal(first.read(path), second.read(path))


def test_a_sentencepiece_model_is_imported_as_a_tokenizer(llama, sentencepiece_model, tmp_path):
    """The folders of Vicuna and LLaVA have ``tokenizer.model`` but no ``tokenizer.json``."""
    decoder("llama").save_pretrained(tmp_path / "source")
    shutil.copytree(llama.name_or_path, tmp_path / "source", dirs_exist_ok=True)
    import_weights(str(tmp_path / "source"), tmp_path / "imported")
    tokenizer = load_tokenizer(str(tmp_path / "imported" / "tokenizer"))
    text = "USER: What is it?\nASSISTANT: a cat"
    reference = sentencepiece.SentencePieceProcessor(str(sentencepiece_model))
    assert tokenizer(text).input_ids == [reference.bos_id(), *reference.encode(text)]


def test_old_pickles_are_read_without_running_code(tmp_path):
    source = tmp_path / "source"
    decoder("llama").save_pretrained(source)
    names = sorted(load_file(source / "model.safetensors"))
    values = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    half = len(names) // 2
    for i, part in enumerate((names[:half], names[half:])):
        torch.save({name: values[name] for name in part}, source / f"pytorch_model-0000{i + 1}-of-00002.bin")
    import_weights(str(source), tmp_path / "imported")
    imported = open_model(tmp_path / "imported")
    np.testing.assert_array_equal(imported.read("llm/embedding"), values["model.embed_tokens.weight"].numpy())

    class Trap:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    torch.save({"model.embed_tokens.weight": Trap()}, source / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match=r"pytorch_model-00001-of-00002\.bin cannot be read as plain weights"):
        import_weights(str(source), tmp_path / "again")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "again").exists()


# ---- LLaVA -----------------------------------------------------------------------------------------------------------


def make_original_config():
    return LlamaConfig(**TEXT).to_dict() | {
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
    }


@pytest.mark.parametrize("layout", ["saved", "hub", "original", "original-no-tower"])
def test_logits_of_llava_match(layout, tmp_path):
    state, source, vision = llava().state_dict(), tmp_path / "source", ""
    if layout == "saved":
        llava().save_pretrained(source)
    elif layout == "hub":
        write(source, to_hub_names(state), llava().config.to_dict())
    else:
        original = to_original_names(state)
        # The tower's shape is not in LLaVA's config; 128 channels are two heads of 64, as tower("clip") has.
        config = make_original_config()
        if layout == "original-no-tower":
            clip = CLIPVisionModel(CLIPVisionConfig(**VISION))
            prefix = "model.vision_tower.vision_tower.vision_model."
            inner = {name.removeprefix(prefix): v for name, v in original.items() if name.startswith(prefix)}
            clip.load_state_dict({
                name: inner[name.removeprefix("vision_model.")] for name in clip.state_dict()
            })  # fmt: skip
            clip.save_pretrained(tmp_path / "tower")
            vision = str(tmp_path / "tower")
            original = {name: value for name, value in original.items() if not name.startswith(prefix)}
        write(source, original, config)
    import_weights(str(source), tmp_path / "imported", vision)
    saved = open_model(tmp_path / "imported")
    assert (saved.description.fusion.fusion, saved.description.fusion.taps) == ("mlp", (3,))
    if layout == "original":  # the epsilon of its norms defaults to CLIP's
        vision_config = dataclasses.replace(saved.description.vision, norm_eps=1e-3)
        dataclasses.replace(saved.description, vision=vision_config).save(tmp_path / "imported")

    ids = tokens(length=24)
    ids[:, 4:20] = 60
    slots = np.full(ids.shape, -1, np.int32)
    slots[:, 4:20] = np.arange(16)
    with torch.no_grad():
        expected = llava()(torch.from_numpy(ids).long(), pixel_values=normalize(make_images())).logits.numpy()
    for mesh, scan in zip(MESHES, (True, False), strict=True):
        actual = our_logits(*load_model(tmp_path / "imported", mesh, scan), ids, make_images()[:, None], slots)
        np.testing.assert_allclose(actual, expected, atol=1e-4)


# ---- LLaVA-STF -------------------------------------------------------------------------------------------------------


def make_stf_tensors(out=32, channels=128, taps=4, kernel=2, hidden=64, seed=5):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "mm_projector_crosslayer.0": (hidden, taps * channels),
        "mm_projector_crosslayer.2": (channels, hidden),
        "mm_projector.0": (4 * hidden, kernel * kernel * channels),
        "mm_projector.2": (out, 4 * hidden),
    }
    state = {}
    for name, shape in shapes.items():
        state[f"model.{name}.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        state[f"model.{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.3
    return state


def compute_reference_tokens(state, images, taps, kernel=2):
    """Written from the paper: concatenated taps, two linear layers, windows channel by channel, two linear layers."""
    with torch.no_grad():
        states = tower("clip")(normalize(images), output_hidden_states=True).hidden_states
        x = torch.cat([states[tap][:, 1:] for tap in taps], -1)

        def layer(name, x):
            return torch.nn.functional.linear(x, state[f"model.{name}.weight"], state[f"model.{name}.bias"])

        x = layer("mm_projector_crosslayer.2", torch.nn.functional.gelu(layer("mm_projector_crosslayer.0", x)))
        batch, patches, channels = x.shape
        side = int(patches**0.5)
        x = x.view(batch, side, side, channels).unfold(1, kernel, kernel).unfold(2, kernel, kernel)
        x = x.reshape(batch, (side // kernel) ** 2, channels * kernel * kernel)
        return layer("mm_projector.2", torch.nn.functional.gelu(layer("mm_projector.0", x))).numpy()


def test_image_tokens_of_llava_stf_match(tmp_path):
    language = decoder("llama").state_dict()
    tower("clip").save_pretrained(tmp_path / "tower")
    # All four blocks are tapped; the deepest tap is the last block but one, as in the paper, so the taps repeat.
    state = make_stf_tensors(taps=4)
    write(tmp_path / "source", {n: v.contiguous() for n, v in (language | state).items()}, make_original_config())
    with pytest.raises(UserError, match="in descending order"):
        import_weights(str(tmp_path / "source"), tmp_path / "no", str(tmp_path / "tower"))
    state = make_stf_tensors(taps=2)
    (tmp_path / "source").rename(tmp_path / "old")
    write(tmp_path / "source", {n: v.contiguous() for n, v in (language | state).items()}, make_original_config())
    import_weights(str(tmp_path / "source"), tmp_path / "imported", str(tmp_path / "tower"))
    fusion = open_model(tmp_path / "imported").description.fusion
    assert (fusion.fusion, fusion.kernel, fusion.taps) == ("mbtf_stf", 2, (3, 2))
    model, mesh = load_model(tmp_path / "imported")
    with compute_context(mesh, "float32"):
        actual = model.image_tokens(jnp.asarray(make_images()[:, None]))
    np.testing.assert_allclose(actual, compute_reference_tokens(state, make_images(), (3, 2)), atol=1e-4)


def test_the_eight_tensors_of_stage_one_are_imported(tmp_path):
    state = make_stf_tensors(taps=8)
    torch.save(state, tmp_path / "mm_projector.bin")
    report = import_weights(str(tmp_path / "mm_projector.bin"), tmp_path / "imported")
    assert len(report["read"]) == 8
    saved = open_model(tmp_path / "imported")
    assert saved.description.vision is None
    assert saved.description.llm is None
    fusion = saved.description.fusion
    assert (fusion.fusion, fusion.kernel, fusion.taps) == ("mbtf_stf", 2, ())
    assert (fusion.mbtf_hidden, fusion.mbtf_width, fusion.stf_hidden) == (64, 128, 256)
    weight = state["model.mm_projector.0.weight"].numpy()
    conv = saved.read("fusion/connector/stf/conv/kernel")
    for c, kh, kw in ((0, 0, 1), (5, 1, 0), (127, 1, 1)):
        np.testing.assert_array_equal(conv[kh, kw, c], weight[:, c * 4 + kh * 2 + kw])


def test_real_sizes_are_detected_without_reading_values():
    shapes = {"model.mm_projector_crosslayer.0.weight": (4096, 8192), "model.mm_projector_crosslayer.0.bias": (4096,)}
    shapes |= {"model.mm_projector_crosslayer.2.weight": (1024, 4096), "model.mm_projector_crosslayer.2.bias": (1024,)}
    shapes |= {"model.mm_projector.0.weight": (16384, 4096), "model.mm_projector.0.bias": (16384,)}
    shapes |= {"model.mm_projector.2.weight": (4096, 16384), "model.mm_projector.2.bias": (4096,)}
    tower = vision_preset("clip-l-14-336")
    tensors = TensorFile({name: Entry(pathlib.Path(), shape, "float16", pytest.fail) for name, shape in shapes.items()})
    found = detect_model(tensors, {"mm_vision_select_layer": -2}, tower)
    assert found.fusion.taps == (23, 21, 18, 15, 12, 9, 6, 3)
    assert found.fusion == FusionConfig(
        taps=found.fusion.taps, mbtf_hidden=4096, mbtf_width=1024, stf_hidden=16384
    )  # fmt: skip


# ---- Reports and errors ----------------------------------------------------------------------------------------------


def test_the_report_lists_every_tensor(tmp_path):
    source = tmp_path / "source"
    decoder("llama").to(torch.float16).save_pretrained(source)
    decoder("llama").to(torch.float32)
    state = load_file(source / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    report = import_weights(str(source), tmp_path / "imported", dtype="bfloat16")
    assert sorted(report["read"]) == sorted(state.keys() - {"model.layers.0.self_attn.rotary_emb.inv_freq"})
    assert report["missing"] == ["vision", "fusion"]
    assert report["parameters"] == sum(value.numel() for value in state.values()) - 4
    assert report["unused"] == {"model.layers.0.self_attn.rotary_emb.inv_freq": "computed from the config"}
    assert report["cast"] == {"float16 to bfloat16": report["read"]}
    assert len(report["transposed"]) == 3 * 7 + 1  # every matrix of every block, and the head
    assert json.loads((tmp_path / "imported" / "import.json").read_text())["unused"] == report["unused"]
    assert llm_preset(str(tmp_path / "imported")).layers == 3


def save_changed(folder, change):
    decoder("llama").save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s, c: s.pop("model.norm.weight"), r"model.norm.weight \(32,\) is missing"),
        (lambda s, c: s.pop("lm_head.weight"), r"lm_head.weight \(62, 32\) is missing"),
        (lambda s, c: s.update({"extra.weight": torch.zeros(2)}), r"extra.weight \(2,\) is unexpected"),
        (
            lambda s, c: c.update(intermediate_size=47),
            r"says intermediate_size 47, but .*gate_proj.weight is \(48, 32\)",
        ),
        (lambda s, c: c.update(num_hidden_layers=2), r"says num_hidden_layers 2, but the tensors hold 3 layers"),
        (
            lambda s, c: s.update({"model.layers.1.self_attn.o_proj.bias": torch.zeros(32)}),
            "o_proj.bias.* is unexpected",
        ),
        (lambda s, c: c.update(model_type="gpt2"), "model_type 'gpt2'"),
        (lambda s, c: c.update(hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda s, c: c.update(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), "'yarn'"),
        (lambda s, c: [s.pop(n) for n in list(s)] and s.update(x=torch.zeros(1)), "no vision tower, language model"),
        (lambda s, c: s.update({"model.layers.0.mlp.q": torch.zeros(2, dtype=torch.float8_e4m3fn)}), "type F8_E4M3"),
    ],
)
def test_errors_name_what_does_not_fit(change, sentence, tmp_path, capsys):
    save_changed(tmp_path / "source", change)
    capsys.readouterr()
    assert run_command(main, ["import", str(tmp_path / "source"), f"--to={tmp_path / 'imported'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert error.count("\n") == 0
    with pytest.raises(UserError, match=sentence):
        import_weights(str(tmp_path / "source"), tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_errors_name_truncated_and_missing_files(tmp_path):
    source = tmp_path / "source"
    decoder("llama").save_pretrained(source, max_shard_size="20KB")
    files = sorted(source.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-10])
    with pytest.raises(UserError, match=files[1].name):
        import_weights(str(source), tmp_path / "imported")
    files[1].unlink()
    with pytest.raises(UserError, match=f"names {files[1].name}, which is missing"):
        import_weights(str(source), tmp_path / "imported")
    shutil.copy(files[0], files[1])
    with pytest.raises(UserError, match="is both in"):
        import_weights(str(source), tmp_path / "imported")
    values = load_file(files[0])
    missing = next(iter(values))
    files[1].write_bytes(content)
    save_file({name: value for name, value in values.items() if name != missing}, files[0])
    with pytest.raises(UserError, match=f"places tensor {missing} in {files[0].name}, which does not contain it"):
        import_weights(str(source), tmp_path / "imported")
    save_file(values, files[0])
    (source / "model.safetensors.index.json").unlink()
    (source / "copy.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is both in"):
        import_weights(str(source), tmp_path / "imported")
    assert not list(tmp_path.glob("imported*"))


def test_a_folder_with_files_is_not_overwritten(tmp_path, capsys):
    decoder("llama").save_pretrained(tmp_path / "source")
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "thesis.txt").write_text("mine")
    assert run_command(main, ["import", str(tmp_path / "source"), f"--to={tmp_path / 'imported'}"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "imported").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert run_command(main, ["import", str(tmp_path / "source"), f"--to={tmp_path / 'link'}"]) == 2
    assert "link is a link or a mount point" in capsys.readouterr().err
    assert run_command(main, ["import", str(tmp_path / "nowhere"), f"--to={tmp_path / 'new'}"]) == 2
    assert "does not exist" in capsys.readouterr().err
