"""Loads LoRA adapters in PEFT's files as the A and B of a run's own adapters, which go on training."""

import math

import jax

from stf_jax.config import UserError
from stf_jax.files import local_copy, to_path
from stf_jax.models.adapters.lora import LoRA
from stf_jax.models.blueprint import Blueprint
from stf_jax.models.spec import ModelSpec
from stf_jax.weights.detect import VOCABULARY
from stf_jax.weights.export_hf import map_modules
from stf_jax.weights.export_peft import map_adapter
from stf_jax.weights.folder import EMBEDDED
from stf_jax.weights.foreign import read_tensors
from stf_jax.weights.locate import name_base
from stf_jax.weights.mapping import TensorMapping
from stf_jax.weights.peft import CONFIG, RENAMES, ROOT, PeftAdapter, is_adapter, read_adapter
from stf_jax.weights.tensors import Entry, TensorFile

# Beginnings of names elsewhere, and in PyTorch's model of our exports.
_CANONICAL = (
    *((new, old) for old, new in RENAMES),
    ("model.", "model.language_model."),  # LLaVA's code
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
)


def split_adapters(sources: str) -> tuple[str, list[str]]:
    """Separates the folders of adapters from the other sources of a config's ``init_from``.

    Raises:
      UserError: there are adapters, but no base.
    """
    names = [part.strip() for part in sources.split(",") if part.strip()]
    adapters = [name for name in names if name not in EMBEDDED and is_adapter(to_path(name))]
    others = [name for name in names if name not in adapters]
    if adapters and not others:
        base = name_base(local_copy(to_path(adapters[0])))
        raise UserError(
            f"init_from names {adapters[0]}, a LoRA adapter, without its base{base}: import that, and name its folder "
            f"too (init_from=BASE,{adapters[0]})."
        )
    return ",".join(others), adapters


def load_adapter(
    name: str, model: ModelSpec, plan: Blueprint, layout: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Loads an adapter onto its devices, with the parameters that were saved whole.

    Args:
      name: the adapter's folder.
      plan: of the run, with its adapters.
      layout: the run's parameters.

    Returns:
      ``{path: array}`` in the dtypes of the files.

    Raises:
      UserError: the folder cannot be read; it does not adapt what the rules adapt, with the same rank and scale; it
        holds other tensors than the model.
    """
    adapter = read_adapter(local_copy(to_path(name)))
    assert model.vision_shape is not None  # a run trains a complete model
    assert model.llm_shape is not None
    plain = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in plan.plain.items()}
    modules = map_modules(plain, model.vision_shape, model.fusion, model.llm_shape)
    path_of = {tensor: path for path, mapping in modules.items() for tensor in mapping.names}
    mappings: dict[str, TensorMapping] = {}
    for path in plan.adapters:
        mappings |= map_adapter(path, modules[path], plan.shapes)
    entries = _rename_entries(name, adapter, path_of, plan)
    mappings |= {path: mapping for path, mapping in modules.items() if entries.keys() & set(mapping.names)}
    loaded: dict[str, jax.Array] = {}
    tensors = TensorFile(entries)
    for path, mapping in mappings.items():
        for tensor in mapping.names:
            if tensor not in tensors:
                raise UserError(f"{name} lacks {tensor} of {path}: let the rules adapt only what the adapter has.")
            shape, rows = tensors.shape(tensor), path in VOCABULARY
            if shape[rows:] != mapping.hf_shape[rows:] or (rows and shape[0] < mapping.hf_shape[0]):
                raise UserError(f"{name} has {tensor} {shape}, but in the base it is {mapping.hf_shape}.")
        value = mapping.from_hf(read_tensors(tensors, path, mapping))
        loaded[path] = jax.make_array_from_callback(value.shape, layout[path].sharding, value.__getitem__)
    return loaded


def _rename_entries(name: str, adapter: PeftAdapter, path_of: dict[str, str], plan: Blueprint) -> dict[str, Entry]:
    """The tensors of an adapter by the names of our own exports. Raises UserError if the rules do not fit it."""
    entries: dict[str, Entry] = {}
    for tensor, entry in adapter.whole.items():
        entries[_find_name(name, tensor, path_of)] = entry
    for module, pair in adapter.parts.items():
        tensor = _find_name(name, f"{module}.weight", path_of)
        path, (rank, scale) = path_of[tensor], adapter.rank_and_scale(module)
        own = plan.adapters.get(path)
        if not isinstance(own, LoRA) or own.rank != rank or not math.isclose(own.scale, scale, rel_tol=1e-6):
            now = f"LoRA of rank {own.rank} and scale {own.scale:g}" if isinstance(own, LoRA) else "no LoRA"
            raise UserError(
                f"{name} adapts {path} with rank {rank} and scale {scale:g} ({CONFIG}), but the rules give it {now}: "
                f"use the action lora:rank={rank},alpha={scale * rank:g}."
            )
        for part, entry in pair.items():
            entries[f"{ROOT}{tensor.removesuffix('weight')}lora_{part}.weight"] = entry
    return entries


def _find_name(folder: str, name: str, path_of: dict[str, str]) -> str:
    """The name of a tensor in PyTorch's model of our exports."""
    names = [name, *(new + name.removeprefix(old) for old, new in _CANONICAL if name.startswith(old))]
    found = next((candidate for candidate in names if candidate in path_of), None)
    if found is None:
        raise UserError(f"{folder} has {name}, which the model lacks: give the adapter's own base and fusion.")
    return found
