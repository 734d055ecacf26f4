"""LoRA adapters in PEFT's files: exports on the export of their base, and imports."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from etils import epath
from make_models import load, make, make_image, to_uint8, turn
from safetensors.torch import load_file, save_file
from tiny import nf4_values, quantized_by_definition

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.checkpointing.params import SavedParams
from stf_jax.cli import run_command
from stf_jax.config import (
    CheckpointConfig,
    FusionConfig,
    MeshConfig,
    TrainConfig,
    UserError,
    default_config,
    from_json,
    resolve,
    to_json,
)
from stf_jax.convert import main
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.training.start import load_start
from stf_jax.training.state import TrainState, state_layout, training_blueprint
from stf_jax.weights.export_hf import export_hf, map_modules
from stf_jax.weights.export_peft import export_peft
from stf_jax.weights.model import open_model
from stf_jax.weights.origin import complete_config

pytestmark = pytest.mark.usefixtures("torch_setup")

RULES = (
    ("llm/blocks/mlp/.*", "lora:rank=3,scaling=rslora"),
    ("llm/.*", "lora:rank=4,alpha=6,dropout=0.1"),
    ("vision/.*", "lora:rank=2"),
    ("fusion/.*", "train*0.1"),
)


def make_lora_run(folder, start, rules=RULES):
    """A run at a step, from an imported folder, whose adapters and fusion have random values."""
    saved, rng = open_model(start), np.random.default_rng(1)
    config = default_config()
    config.model.update(vision=str(start), llm=str(start), precision="float32")
    config.model.fusion.update(dataclasses.asdict(saved.description.fusion))
    config.data.update(source="scenes", tokenizer=str(start / "tokenizer"))
    config.rules = rules
    (config,) = resolve(config)
    plan = training_blueprint(config)
    values = {path: np.asarray(saved.read(path)) for path in saved.shapes}
    values |= {path: 0.2 * rng.normal(size=plan.shapes[path].shape) for path in plan.adapted}
    values |= {path: x + 0.1 * rng.normal(size=x.shape) for path, x in values.items() if path.startswith("fusion/")}
    values = {path: jnp.asarray(value, jnp.float32) for path, value in values.items()}
    trainable = {path for path in values if path in plan.adapted or path.startswith("fusion/")}
    for path in plan.quantized:
        quantized = quantized_by_definition(plan, path, values[path])
        values |= {name: jnp.asarray(value) for name, value in quantized.items()}
    trees = [{p: x for p, x in values.items() if (p in trainable) == trains} for trains in (True, False)]
    with Checkpoints(epath.Path(folder), CheckpointConfig()) as checkpoints:
        state = TrainState(jnp.int32(3), *trees, {})
        checkpoints.save(3, state, {}, {}, last=True)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    return folder


@pytest.fixture(scope="module", params=["mbtf_stf", "mlp"])
def run(request, tmp_path_factory):
    """Folders of a run with LoRA, of its adapter in PEFT's files, and of the exports of the base and of the run."""
    root = epath.Path(tmp_path_factory.mktemp("peft"))
    make(root / "base", FusionConfig(request.param), "clip", "llama")
    make_lora_run(root / "run", root / "base")
    export_peft(root / "run", root / "adapter")
    for name in ("base", "run"):
        export_hf(root / name, root / f"{name}-hf")
    return root


def _inputs(processor):
    content = turn("Which of them is red?", make_image(1), make_image(2, (36, 80)))
    return processor.apply_chat_template(
        [content], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _logits(model, processor):
    with torch.no_grad():
        return model(**_inputs(processor)).logits.numpy()


def test_adapters_by_their_definition_on_the_base_are_the_merged_export(run):
    """W + alpha/r·B·A in torch, with the names and values of PEFT's files."""
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    tensors = {
        name.removeprefix("base_model.model."): value
        for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items()
    }
    (base, processor), (merged, _) = load(run / "base-hf"), load(run / "run-hf")
    expected, found = merged.state_dict(), base.state_dict()
    assert np.abs(_logits(base, processor) - _logits(merged, processor)).max() > 0.1
    for module in config["target_modules"]:
        rank = config["rank_pattern"].get(module, config["r"])
        a, b = (tensors.pop(f"{module}.lora_{name}.weight") for name in "AB")
        assert a.shape[0] == b.shape[1] == rank
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        found[f"{module}.weight"] = found[f"{module}.weight"] + alpha / rank * (b @ a)
    assert all(name.startswith(tuple(config["modules_to_save"])) for name in tensors)
    assert not config["use_rslora"]
    found |= tensors
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


def _in_nf4(weight):
    """PyTorch's weight [outputs, inputs], as the nearest values of NF4 in blocks of up to 64 inputs."""
    values = torch.tensor(nf4_values(), dtype=torch.float32)
    largest = weight.abs().amax(-1, keepdim=True)
    return values[((weight / largest)[..., None] - values).abs().argmin(-1)] * largest


def test_the_export_of_a_run_on_quantized_kernels_has_what_they_stand_for(run, tmp_path):
    """Row by row of PyTorch's weights: in 127 steps of their largest magnitude or in NF4, then merged."""
    rules = ("llm/blocks/mlp/.*", "lora:rank=4,alpha=6@nf4"), ("llm/.*", "lora:rank=4,alpha=6@int8"), *RULES[2:]
    make_lora_run(tmp_path / "run", run / "base", rules)
    export_hf(tmp_path / "run", tmp_path / "hf")
    export_peft(tmp_path / "run", tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (base, _), (found, _) = load(run / "base-hf"), load(tmp_path / "hf")
    before, checked = base.state_dict(), 0
    for name, value in found.state_dict().items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in adapter:
            a, b = (adapter[f"{prefix}.lora_{part}.weight"] for part in "AB")
            whole = before[name]
            if ".mlp." in prefix and "vision" not in prefix:
                whole, checked = torch.cat([_in_nf4(block) for block in whole.split(64, 1)], 1), checked + 1
            elif "vision" not in prefix:
                step = whole.abs().amax(1, keepdim=True) / 127
                whole, checked = torch.round(whole / step) * step, checked + 1
            scale = 6 / 4 if a.shape[0] == 4 else 2
            torch.testing.assert_close(value, whole + scale * (b @ a), atol=1e-5, rtol=0, msg=name)
    assert checked == 7 * base.config.text_config.num_hidden_layers


def test_peft_on_the_export_of_the_base_gives_the_logits_of_the_run(run):
    (base, processor), (merged, _) = load(run / "base-hf"), load(run / "run-hf")
    expected, adapted = _logits(merged, processor), peft.PeftModel.from_pretrained(base, run / "adapter")
    np.testing.assert_allclose(_logits(adapted, processor), expected, atol=1e-4)


@pytest.mark.parametrize("run", ["mbtf_stf"], indirect=True)
def test_gradients_of_a_and_b_equal_torchs(run):
    """Of the cross-entropy of the next tokens of text, in float32; measured: 2e-5 of the largest of each array."""
    base, processor = load(run / "base-hf")
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter", is_trainable=True).eval()
    inputs = _inputs(processor)
    ids = inputs["input_ids"][0]
    is_image = (ids == processor.image_token_id).numpy()
    kept = np.flatnonzero(~is_image[1:])
    torch.nn.functional.cross_entropy(adapted(**inputs).logits[0, kept], ids[kept + 1]).backward()

    saved, raw = open_model(run / "run"), SavedParams(run / "run")
    rules = tuple((pattern, action.replace(",dropout=0.1", "")) for pattern, action in RULES)
    plan = training_blueprint(TrainConfig(model=dataclasses.replace(saved.config, remat="none"), rules=rules))
    trainable, frozen = (
        {p: jnp.asarray(raw.read(p)) for p in plan.shapes if (p in plan.adapted) == is_adapter}
        for is_adapter in (True, False)
    )
    slots = np.where(is_image, np.cumsum(is_image) - 1, -1)[None]
    pixels = to_uint8(inputs, saved.description.vision)[None]

    def loss(trainable):
        tokens = jnp.where(is_image, 0, ids.numpy())[None]
        logits = plan.merge(trainable, frozen)(
            tokens, jnp.arange(len(ids))[None], None, jnp.asarray(slots), jnp.asarray(pixels)
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits[0, kept], ids.numpy()[kept + 1]).mean()

    with compute_context(make_mesh(MeshConfig(1, 1, 1)), "float32"):
        found = jax.jit(jax.grad(loss))(trainable)
    expected = {name: parameter.grad for name, parameter in adapted.named_parameters() if "lora_" in name}
    model = saved.config
    modules = map_modules(saved.shapes, model.vision_shape, model.fusion, model.llm_shape)
    for path, mapping in modules.items():
        for name in ("a", "b") if path in plan.adapters else ():
            gradient = np.asarray(found[f"{path.removesuffix('kernel')}adapter/{name}"])
            for layer, tensor in enumerate(mapping.names):
                module = tensor.removesuffix("weight")
                value = expected.pop(f"base_model.model.{module}lora_{name.upper()}.default.weight").T.numpy()
                atol = 5e-5 * np.abs(value).max()
                assert atol > 0
                np.testing.assert_allclose(gradient[layer].reshape(value.shape), value, atol=atol, err_msg=tensor)
    assert not expected


# ---- Import ----------------------------------------------------------------------------------------------------------


def _assert_equal(folder, run):
    found, expected = open_model(folder), open_model(run)
    assert found.shapes.keys() == expected.shapes.keys()
    for path in expected.shapes:
        np.testing.assert_allclose(found.read(path), expected.read(path), atol=1e-6, err_msg=path)


def test_an_export_is_imported_with_its_base(run, tmp_path):
    arguments = [str(run / "adapter"), f"--base={run / 'base-hf'}", f"--to={tmp_path / 'new'}"]
    assert run_command(main, ["import", *arguments]) == 0
    _assert_equal(epath.Path(tmp_path) / "new", run / "run")


# Names in our exports of both kinds, and in LLaVA's code, whose base is the language model alone.
_LLAVAS = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head": "lm_head",
    "model.multi_modal_projector.linear_1": "model.mm_projector.0",
    "model.multi_modal_projector.linear_2": "model.mm_projector.2",
}


def _rename(name):
    old = next((old for old in _LLAVAS if old in name), "")
    return name.replace(old, _LLAVAS.get(old, ""))


@pytest.fixture
def llava(run, tmp_path):
    """Folders of LLaVA's script: LoRA of a language model and a projector, and the language model."""
    folder, base = tmp_path / "llava-lora", tmp_path / "vicuna"
    folder.mkdir()
    base.mkdir()
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "modules_to_save": None}
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {_rename(name): value for name, value in config[key].items()}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {_rename(name): x for name, x in load_file(run / "adapter" / "adapter_model.safetensors").items()}
    lora = {name: value for name, value in tensors.items() if name.startswith("base_model.model.model.layers.")}
    save_file(lora, folder / "adapter_model.safetensors")
    projector = {name: value for name, value in tensors.items() if "mm_projector" in name}
    torch.save(projector, folder / "non_lora_trainables.bin")
    weights = {_rename(name): value for name, value in load_file(run / "base-hf" / "model.safetensors").items()}
    vicuna = {name: x for name, x in weights.items() if name.startswith(("model.", "lm_head")) and "vision" not in name}
    save_file({name: x for name, x in vicuna.items() if "projector" not in name}, base / "model.safetensors")
    language = json.loads((run / "base-hf" / "config.json").read_text())["text_config"]
    (base / "config.json").write_text(json.dumps(language))
    (folder / "config.json").write_text(json.dumps(language | {"mm_vision_select_layer": -1}))
    return folder


def test_an_adapter_of_llavas_script_is_imported_with_its_base(run, llava, tmp_path):
    arguments = [str(llava), f"--base={tmp_path / 'vicuna'}", f"--vision={run / 'base-hf'}", f"--to={tmp_path / 'new'}"]
    assert run_command(main, ["import", *arguments]) == 0
    found, merged, base = (open_model(folder) for folder in (epath.Path(tmp_path) / "new", run / "run", run / "base"))
    assert found.shapes.keys() == merged.shapes.keys()
    for path in merged.shapes:
        expected = (base if path.startswith("vision/") else merged).read(path)
        value = found.read(path)[: len(expected)]
        np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=path)


def _change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_adapters_that_cannot_be_merged_are_rejected(run, llava, tmp_path, capsys):
    """With status 2, a sentence, and no folder left."""

    def fails(message, *options):
        assert run_command(main, ["import", *map(str, options), f"--to={tmp_path / 'new'}"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    base = f"--base={tmp_path / 'vicuna'}"
    fails("a LoRA adapter, not a complete model: import it with its base, lmsys/vicuna-7b-v1.5 (convert import", llava)
    fails("is for a LoRA adapter, but", run / "base-hf", base)
    fails("which the base lacks: give the adapter's own base", llava, f"--base={run / 'base-hf'}")
    _change(llava, r=5, rank_pattern={})
    fails("in the base: give the adapter's own base", llava, base)
    _change(llava, alpha_pattern={}, lora_alpha=float("nan"))
    fails("lora_alpha=nan, which should be numbers", llava, base)
    _change(llava, use_dora=True)
    fails("does not describe plain LoRA", llava, base)


# ---- Continued training ----------------------------------------------------------------------------------------------


def _load_start(run, sources, rules):
    """What a run with these rules starts from."""
    config = from_json(json.loads((run / "run" / "config.json").read_text()))
    config = complete_config(dataclasses.replace(config, init_from=",".join(map(str, sources)), rules=rules))
    plan, tx = training_blueprint(config), optax.sgd(0.0)
    layout = state_layout(config, plan, tx, make_mesh(MeshConfig(1, 1, 1)))
    loaded, base = load_start(config, plan, layout)
    assert base.init_from == (str(run / "base"),)
    return {path: np.asarray(value) for path, value in loaded.items()}, plan


def test_a_run_starts_from_the_a_and_b_of_an_export(run):
    """To the bit, with its fusion, beside the base: the parameters are those of the run that was exported."""
    found, plan = _load_start(run, (run / "base", run / "adapter"), RULES)
    expected = SavedParams(run / "run")
    assert found.keys() == expected.shapes.keys() == plan.shapes.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, expected.read(path), err_msg=path, strict=True)


@pytest.mark.parametrize("run", ["mlp"], indirect=True)
def test_a_run_starts_from_an_adapter_of_llavas_script(run, llava):
    """On kernels in NF4, which the adapter does not change."""
    rules = tuple((pattern, action if "lora" not in action else f"{action}@nf4") for pattern, action in RULES)
    found, plan = _load_start(run, (run / "base", llava), (*rules[:2], ("vision/.*", "freeze"), rules[3]))
    expected, checked = SavedParams(run / "run"), 0
    for path, value in found.items():
        if path.startswith("fusion/") or path in plan.adapted:
            np.testing.assert_array_equal(value, expected.read(path), err_msg=path, strict=True)
            checked += path in plan.adapted
        else:
            assert (value.dtype == np.uint8) == (path in plan.quantized)
    assert checked == len(plan.adapted) == 2 * 7


@pytest.mark.parametrize("run", ["mlp"], indirect=True)
def test_adapters_that_do_not_fit_the_rules_or_lack_their_base_are_rejected(run, llava):
    def fails(message, *sources, rules=RULES):
        with pytest.raises(UserError, match=message):
            _load_start(run, sources, rules)

    base = run / "base"
    fails(rf"^init_from names {llava}, a LoRA adapter, without its base, lmsys/vicuna-7b-v1.5: import that", llava)
    fails(rf"{llava} lacks base_model.* of vision/.*: let the rules adapt only what the adapter has", base, llava)
    rules = (RULES[0], ("llm/.*", "lora:rank=8,alpha=12"), *RULES[2:])
    fails(r"rank 4 and scale 1.5 .* of rank 8 and scale 1.5: use .* lora:rank=4,alpha=6", base, llava, rules=rules)
    rules = (RULES[0], ("llm/.*", "lora:rank=4,alpha=4"), *RULES[2:])
    fails(r"rank 4 and scale 1.5 .* of rank 4 and scale 1: use", base, llava, rules=rules)
    fails("the rules give it no LoRA", base, llava, rules=(("llm/.*", "freeze"), ("fusion/.*", "train"), *RULES[2:]))
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.model.other.weight": torch.ones(2)}, llava / "adapter_model.safetensors")
    fails("has model.other.weight, which the model lacks", base, llava)
