"""Exports the LoRA adapters and the fusion of a run for PEFT, which puts them on the ``hf`` export of its base."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from stf_jax.checkpointing.params import SavedParams
from stf_jax.checkpointing.rules import Decision, decide
from stf_jax.config import UserError, from_json
from stf_jax.files import read_json, write_json
from stf_jax.models.adapters.base import ADAPTER
from stf_jax.models.adapters.lora import LoRA
from stf_jax.models.blueprint import blueprint
from stf_jax.weights.export_hf import map_modules
from stf_jax.weights.exports import ExportStream, refuse_schedule, require_complete
from stf_jax.weights.folder import new_folder
from stf_jax.weights.mapping import TensorMapping
from stf_jax.weights.model import open_model
from stf_jax.weights.peft import CONFIG, ROOT
from stf_jax.weights.shards import write_file

_WEIGHT = ".weight"


def export_peft(checkpoint: epath.Path, to: epath.Path, dtype: str = "") -> dict[str, Any]:
    """Writes a folder for ``PeftModel.from_pretrained``; it appears when it is complete.

    Args:
      checkpoint: workdir of a run with LoRA.
      to: the folder to write; it must not exist.
      dtype: the type to cast values to; empty: each keeps its own.

    Returns:
      The report of :class:`stf_jax.weights.exports.ExportStream`.

    Raises:
      UserError: the checkpoint cannot be read or has no LoRA; more than adapters and the fusion is trained; ``to``
        exists.
    """
    with new_folder(to) as folder:
        saved = open_model(checkpoint)
        if saved.step is None:
            raise UserError(f"{checkpoint} is no run, so it has no adapters; export it with --format=hf.")
        refuse_schedule(saved, checkpoint)
        model, plan, raw = require_complete(saved, checkpoint), blueprint(saved.config), SavedParams(checkpoint)
        rules = from_json(read_json(checkpoint / "config.json")).rules
        decisions = decide(rules, {path: plan.depth(path) for path in plan.shapes}, plan.linears)
        adapters = _find_lora(checkpoint, decisions)
        kernels = map_modules(saved.shapes, model.vision, model.fusion, model.llm)
        fusion = {path: mapping for path, mapping in kernels.items() if path.startswith("fusion/")}
        mappings = {path: _rename(mapping, _WEIGHT, _WEIGHT) for path, mapping in fusion.items()}
        for path in adapters:
            mappings |= map_adapter(path, kernels[path], raw.shapes)
        shapes = {path: (saved if path in fusion else raw).shapes[path] for path in mappings}

        def read(path: str) -> np.ndarray:
            return (saved if path in fusion else raw).read(path)

        stream = ExportStream(dataclasses.replace(saved, shapes=shapes, read=read), mappings, dtype)
        write_file(folder / "adapter_model.safetensors", dict(stream))
        modules = {name.removesuffix(_WEIGHT): lora for path, lora in adapters.items() for name in kernels[path].names}
        # A fusion's modules, such as model.mm_projector, are saved whole.
        whole = {".".join(name.split(".")[:2]) for mapping in fusion.values() for name in mapping.names}
        write_json(epath.Path(folder, CONFIG), _adapter_config(modules, sorted(whole)))
        stream.save_report(folder)
    return stream.report


def _find_lora(checkpoint: epath.Path, decisions: Mapping[str, Decision]) -> dict[str, LoRA]:
    adapters: dict[str, LoRA] = {}
    for path, decision in decisions.items():
        if isinstance(decision.adapter, LoRA):
            adapters[path] = decision.adapter
        elif any(decision.factors) and not path.startswith("fusion/"):
            what = "trains whole" if decision.adapter is None else "has an adapter that PEFT lacks"
            raise UserError(f"{checkpoint}: {path} {what}; export the run with --format=hf, which merges adapters.")
    if not adapters:
        raise UserError(f"{checkpoint} has no LoRA adapters; export it with --format=hf.")
    return adapters


def map_adapter(
    path: str, kernel: TensorMapping, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, TensorMapping]:
    """Maps A and B of a kernel to PEFT's ``lora_A.weight`` [r, inputs] and ``lora_B.weight`` [outputs, r].

    Raises UserError if PyTorch has the kernel's axes in another order.
    """
    paths = [f"{path.removesuffix('kernel')}{ADAPTER}/{name}" for name in "ab"]
    a, b = (shapes[leaf].shape[1:] for leaf in paths)  # [*inputs, r], [r, *outputs]
    inputs, outputs = tuple(range(len(a) - 1)), tuple(range(1, len(b)))
    if kernel.layout != (tuple(len(inputs) - 1 + axis for axis in outputs), inputs):
        raise UserError(f"{path} has another order of axes in PyTorch than its adapter; export with --format=hf.")
    layouts = ((len(a) - 1,), inputs), (outputs, (0,))
    return {
        leaf: dataclasses.replace(_rename(kernel, _WEIGHT, f".{name}{_WEIGHT}"), layout=layout, shape=shape)
        for leaf, name, layout, shape in zip(paths, ("lora_A", "lora_B"), layouts, (a, b), strict=True)
    }


def _rename(mapping: TensorMapping, suffix: str, replacement: str) -> TensorMapping:
    """A mapping to PEFT's names for the tensors of a model."""
    names = (name.removesuffix(suffix) + replacement if name.endswith(suffix) else name for name in mapping.names)
    return dataclasses.replace(mapping, names=tuple(ROOT + name for name in names))


def _adapter_config(modules: Mapping[str, LoRA], modules_to_save: Sequence[str]) -> dict[str, Any]:
    """Returns ``adapter_config.json`` for adapters by module. The scale is always alpha / rank there."""
    ranks = {name: lora.rank for name, lora in modules.items()}
    alphas = {name: lora.scale * lora.rank for name, lora in modules.items()}
    (rank, _), *_ = collections.Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = collections.Counter(alphas.values()).most_common(1)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(lora.dropout for lora in modules.values()),
        "use_rslora": False,
        "bias": "none",
        "target_modules": list(modules),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "modules_to_save": list(modules_to_save),
    }
