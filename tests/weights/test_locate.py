"""Which files of a folder are read as its weights, compared with transformers' choice."""

import itertools
import json
import pathlib

import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from stf_jax.config import UserError
from stf_jax.weights.foreign import open_checkpoint
from stf_jax.weights.locate import locate_weights
from stf_jax.weights.tensors import open_tensors

INDEX = {"model.safetensors.index.json": ".safetensors", "pytorch_model.bin.index.json": ".bin"}
ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def add(folder, name, kind="file"):
    """Adds a file, a link into blobs/ as in a cache, a dangling link, or a folder of that name."""
    folder.mkdir(exist_ok=True)
    target, content = folder / name, "weights"
    if name.endswith(".index.json"):
        end = pathlib.PurePath(name.removesuffix(".index.json"))
        shards = [f"{end.stem}-0000{i}-of-00002{end.suffix}" for i in (1, 2)]
        content = json.dumps({"metadata": {}, "weight_map": dict(zip("ab", shards, strict=True))})
        for shard in shards:
            (folder / shard).write_text("shard")
    if kind == "file":
        target.write_text(content)
    elif kind == "folder":
        target.mkdir()
    else:
        blob = folder / "blobs" / name
        if kind == "link":
            blob.parent.mkdir(exist_ok=True)
            blob.write_text(content)
        target.symlink_to(pathlib.Path("blobs") / name)


def transformers_choice(folder, weights_name=None):
    """Returns file names; None if transformers refuses the folder."""
    try:
        files, _ = _get_resolved_checkpoint_files(
            str(folder), None, None, None, None, False, weights_name, download_kwargs={"local_files_only": True}
        )
    except (OSError, ValueError):
        return None
    return [pathlib.Path(file).name for file in files]


def our_choice(folder, weights_name=None):
    return [file.name for file in locate_weights(folder, weights_name).files]


def test_every_combination_of_names_is_read_as_in_transformers(tmp_path):
    kinds = ("", "file", "link", "dangling", "folder")
    for number, chosen in enumerate(itertools.product(kinds, repeat=4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("model.fp16.safetensors", "consolidated.safetensors.index.json", "adapter_model.safetensors"):
            add(folder, name)
        for name, kind in zip(ORDER, chosen, strict=True):
            if kind:
                add(folder, name, kind)
        expected = transformers_choice(folder)
        if expected is not None:
            assert our_choice(folder) == expected, chosen
            continue
        with pytest.raises(UserError) as raised:
            locate_weights(folder)
        broken = next((kind for kind in chosen if kind), "adapter")
        sentences = {"dangling": "is a link to blobs/", "folder": "is a folder where", "adapter": "is a LoRA adapter"}
        assert sentences[broken].replace("is a LoRA", "a LoRA") in str(raised.value), chosen


def test_the_file_in_the_config_comes_first(tmp_path):
    for name in ("model.safetensors", "other.safetensors", "other.safetensors.index.json"):
        add(tmp_path / "w", name)
    for name in ("other.safetensors", "other.safetensors.index.json"):
        assert our_choice(tmp_path / "w", name) == transformers_choice(tmp_path / "w", name)
    for name in ("../w/other.safetensors", "/etc/passwd.safetensors", "pytorch_model.bin", "absent.safetensors", 3):
        with pytest.raises(UserError):
            locate_weights(tmp_path / "w", name)


def test_a_single_file_beside_an_old_index_is_read(tmp_path):
    """Case 60: the shards and their index are from an earlier save."""
    folder = tmp_path / "w"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    tensors = open_tensors(folder)
    assert tensors.read("a").tolist() == [1, 1]
    assert "model.safetensors is read" in tensors.notes[0]


@pytest.mark.parametrize("other", ["consolidated", "model.fp16", "model.bf16", "diffusion_pytorch_model"])
def test_the_index_of_other_files_is_ignored(tmp_path, other):
    """Case 61: tensors listed by another index are no reason to refuse the folder."""
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / f"{other}-00001-of-00001.safetensors")
    for name, tensor in (("model", "a"), (other, "b")):
        index = {"metadata": {}, "weight_map": {tensor: f"{name}-00001-of-00001.safetensors"}}
        (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    assert open_tensors(tmp_path).names == ["a"]


def test_a_single_index_of_a_variant_is_read(tmp_path):
    add(tmp_path, "model.fp16.safetensors.index.json")
    add(tmp_path, "consolidated.safetensors.index.json")
    assert our_choice(tmp_path) == ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
    add(tmp_path, "model.bf16.safetensors.index.json")
    with pytest.raises(UserError, match=r"several indexes \(model\.bf16\.\S+, model\.fp16\.\S+\): keep the one"):
        locate_weights(tmp_path)


def test_an_index_may_list_the_wrong_shard(tmp_path):
    """As in transformers, which reads all shards."""
    for number, name in ((1, "a"), (2, "b")):
        save_file({name: torch.ones(2)}, tmp_path / f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(open_tensors(tmp_path).names) == ["a", "b"]


def test_shards_may_be_in_a_subfolder(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1.safetensors").write_text("shard")
    index = {"metadata": {}, "weight_map": {"a": "parts/1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert our_choice(tmp_path) == transformers_choice(tmp_path) == ["1.safetensors"]
    for wrong in ("../1.safetensors", "parts/../../1.safetensors", "/1.safetensors", ""):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": wrong}}))
        with pytest.raises(UserError, match="not a file in its folder"):
            locate_weights(tmp_path)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "holds no weights"),
        (["config.json"], "holds no weights"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "adapter_config.json, a LoRA adapter.*import it",
        ),
        (["adapter_model.bin", "non_lora_trainables.bin"], "adapter_model.bin, a LoRA adapter"),
        (["consolidated.safetensors"], "names of Mistral's or Meta's own code"),
        (["consolidated.00.pth", "params.json"], "names of Mistral's or Meta's own code"),
        (["flax_model.msgpack"], "for Flax"),
        (["tf_model.h5"], "for TensorFlow"),
        (["model.onnx"], "for ONNX"),
        (["pytorch_model.pt"], "a torch pickle"),
        (["training_args.bin"], "holds no weights"),
        (["checkpoint-5/model.safetensors"], "its folder checkpoint-5 does: give .*/w/checkpoint-5"),
        (["refs/main", "snapshots/abc/model.safetensors"], "its folder snapshots/abc does: give .*/w/snapshots/abc"),
        (["a.gguf", "b.gguf"], "holds 2 GGUF files; give the path of the one"),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            "model-00002-of-00003.safetensors is m",
        ),
        (["pytorch_model-00002-of-00002.bin"], "pytorch_model-00001-of-00002.bin is missing, although"),
    ],
)
def test_a_folder_without_weights_is_refused_with_the_fix(tmp_path, names, sentence):
    (tmp_path / "w").mkdir()
    for name in names:
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / name).write_text("x")
    assert transformers_choice(tmp_path / "w") is None
    with pytest.raises(UserError, match=sentence):
        locate_weights(tmp_path / "w")


def test_a_gguf_is_read_if_transformers_finds_nothing(tmp_path):
    for name in ("model-q4.gguf", "mmproj-model-f16.gguf", "imatrix.bin"):
        add(tmp_path, name)
    assert our_choice(tmp_path) == ["model-q4.gguf"]
    add(tmp_path, "pytorch_model.bin")
    assert our_choice(tmp_path) == transformers_choice(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_links_and_folders_in_place_of_files_are_refused(tmp_path, name):
    """A folder copied from a cache may contain dangling links."""
    (tmp_path / "w").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "w" / "model.safetensors")
    (tmp_path / "w" / name).unlink(missing_ok=True)
    (tmp_path / "w" / name).symlink_to("../../blobs/0123")
    with pytest.raises(UserError, match=rf"{name} is a link to \.\./\.\./blobs/0123, which does not exist.*cp -rL"):
        open_checkpoint(str(tmp_path / "w"))
    with pytest.raises(UserError, match="which does not exist"):
        open_checkpoint(str(tmp_path / "w" / name))
    (tmp_path / "w" / name).unlink()
    (tmp_path / "w" / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder where a file is expected"):
        open_checkpoint(str(tmp_path / "w"))


def test_shards_that_are_dangling_links_are_refused(tmp_path):
    add(tmp_path, "model.safetensors.index.json")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is a link to nowhere"):
        locate_weights(tmp_path)
