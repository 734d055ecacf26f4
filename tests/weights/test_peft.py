"""LoRA adapters in PEFT's files: exports on the export of their base, and imports."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from make_models import load, make, make_image, turn
from safetensors.torch import load_file

from stf_jax.checkpointing.manager import Checkpoints
from stf_jax.config import CheckpointConfig, FusionConfig, default_config, resolve, to_json
from stf_jax.training.state import TrainState, training_blueprint
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.export_peft import export_peft
from stf_jax.weights.model import open_model

pytestmark = pytest.mark.usefixtures("torch_setup")

RULES = (
    ("llm/blocks/mlp/.*", "lora:rank=3,scaling=rslora"),
    ("llm/.*", "lora:rank=4,alpha=6,dropout=0.1"),
    ("vision/.*", "lora:rank=2"),
    ("fusion/.*", "train*0.1"),
)


def make_lora_run(folder, start, rules=RULES):
    """A run at a step from an imported folder, with other weights in its fusion, and its adapters, than at the start."""
    saved, rng = open_model(start), np.random.default_rng(1)
    config = default_config()
    config.model.update(vision=str(start), llm=str(start), precision="float32")
    config.model.fusion.update(dataclasses.asdict(saved.description.fusion))
    config.data.update(source="scenes", tokenizer=str(start / "tokenizer"))
    config.rules = rules
    (config,) = resolve(config)
    plan = training_blueprint(config.model, rules)
    values = {path: np.asarray(saved.read(path)) for path in saved.shapes}
    values |= {path: 0.2 * rng.normal(size=plan.shapes[path].shape) for path in plan.adapted}
    values |= {path: x + 0.1 * rng.normal(size=x.shape) for path, x in values.items() if path.startswith("fusion/")}
    values = {path: jnp.asarray(value, jnp.float32) for path, value in values.items()}
    trainable = {path for path in values if path in plan.adapted or path.startswith("fusion/")}
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


def _logits(model, processor):
    content = turn("Which of them is red?", make_image(1), make_image(2, (36, 80)))
    inputs = processor.apply_chat_template(
        [content], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits.numpy()


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


def test_peft_on_the_export_of_the_base_gives_the_logits_of_the_run(run):
    peft = pytest.importorskip("peft")
    (base, processor), (merged, _) = load(run / "base-hf"), load(run / "run-hf")
    expected, adapted = _logits(merged, processor), peft.PeftModel.from_pretrained(base, run / "adapter")
    np.testing.assert_allclose(_logits(adapted, processor), expected, atol=1e-4)
