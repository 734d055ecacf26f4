"""Conflicts between a config and the tensors: the tensors win, with a note, or the checkpoint is refused."""

import json
import logging
import pathlib

import numpy as np
import pytest
import torch
from etils import epath
from reference import DECODERS, decoder, llava, tower
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.convert import main
from stf_jax.weights.detect import detect_model
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model
from stf_jax.weights.tensors import Entry, TensorFile

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ATTENTION = "model.layers.{}.self_attn."


def open_in_memory(state):
    """Returns a TensorFile of tensors in memory."""

    def entry(value):
        dtype = str(value.dtype).removeprefix("torch.")
        is_supported = dtype in ("float32", "float16", "bfloat16", "int32", "int64")
        return Entry(pathlib.Path("w"), tuple(value.shape), dtype, value.numpy if is_supported else None)

    return TensorFile({name: entry(value.detach()) for name, value in state.items()})


def detect(model, state=(), without=(), **config):
    """Detects a transformers model after changing some tensors and config keys."""
    state = {**model.state_dict(), **dict(state)}
    state = {name: value for name, value in state.items() if name not in without}
    config = {key: value for key, value in {**model.config.to_dict(), **config}.items() if value is not KeyError}
    return detect_model(open_in_memory(state), config)


def layer_tensors(family, part, shape):
    """Returns a tensor of ones for each layer."""
    return {f"model.layers.{i}.{part}": torch.ones(shape) for i in range(decoder(family).config.num_hidden_layers)}


def test_a_correct_config_gives_no_notes():
    for family in DECODERS:
        assert detect(decoder(family)).notes == ()
    for family in ("clip", "siglip"):
        assert detect(tower(family)).notes == ()
    assert detect(llava()).notes == ()


# ---- Output heads ----------------------------------------------------------------------------------------------------


def save_checkpoint(folder, state, **changes):
    folder.mkdir()
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    config = decoder("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("stored", ["both", "equal", "embedding", "head"])
def test_heads_are_tied_as_in_transformers(tmp_path, stored, caplog):
    """Case 75: the config ties the head, but the file contains a head with other values."""
    state = dict(decoder("llama").state_dict())
    if stored != "both":
        state[HEAD] = state[EMBEDDING]
    for name in {"embedding": [HEAD], "head": [EMBEDDING]}.get(stored, []):
        del state[name]
    folder = save_checkpoint(tmp_path / "w", state, tie_word_embeddings=True)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    caplog.clear()
    report = import_weights(str(folder), tmp_path / "imported")
    caplog.set_level(logging.INFO, "stf_jax")
    for model in (open_model(folder), open_model(tmp_path / "imported")):
        assert model.description.llm.tied is (stored != "both")
        np.testing.assert_array_equal(model.read("llm/embedding"), reference.model.embed_tokens.weight.detach())
        if stored == "both":
            np.testing.assert_array_equal(model.read("llm/head/kernel").T, reference.lm_head.weight.detach())
    mentions = ["tie_word_embeddings" in text for text in (*report["notes"], *caplog.messages)]
    assert sum(mentions) == 2 * (stored == "both")


def test_only_head_and_embedding_are_read_to_compare_them():
    state = decoder("llama").state_dict()
    entries = {
        name: Entry(
            pathlib.Path("w"), tuple(value.shape), "float32", value.numpy if name in (EMBEDDING, HEAD) else 1 / 2
        )
        for name, value in state.items()
    }
    found = detect_model(TensorFile(entries), decoder("llama").config.to_dict() | {"tie_word_embeddings": True})
    assert not found.llm.tied


def test_a_missing_head_is_refused():
    with pytest.raises(UserError, match=r"lm_head\.weight \(62, 32\) is missing"):
        detect(decoder("llama"), without=[HEAD])
    with pytest.raises(UserError, match=r"embedding.s tensor is missing"):
        detect(decoder("llama"), without=[EMBEDDING])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [61, 64])
def test_head_and_embedding_need_the_same_rows(rows, tied):
    with pytest.raises(UserError, match=f"lm_head.weight has {rows} rows and model.embed_tokens.weight 62"):
        detect(decoder("llama"), {HEAD: torch.zeros(rows, 32)}, tie_word_embeddings=tied)


# ---- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "field", "value"),
    [
        ("llama", {"num_key_value_heads": 4}, "kv_heads", 2),
        ("llama", {"num_key_value_heads": 1}, "kv_heads", 2),
        ("llama", {"vocab_size": 60}, "vocab", 62),
        ("llama", {"vocab_size": 64}, "vocab", 62),
        ("qwen3", {"head_dim": 16}, "head_dim", 8),
        ("qwen3", {"num_attention_heads": 8}, "heads", 4),
    ],
)
def test_conflicts_with_the_tensors_are_noted(family, change, field, value):
    found = detect(decoder(family), **change)
    assert getattr(found.llm, field) == value
    ((key, configured),) = change.items()
    assert found.notes == (f"The config says {key} {configured}, but the tensors have {value}, which is used.",)


@pytest.mark.parametrize("key", ["num_key_value_heads", "vocab_size", "head_dim", "attention_bias"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_missing_config_keys_are_inferred_from_the_tensors(family, key):
    found, expected = detect(decoder(family), **{key: KeyError}), detect(decoder(family))
    assert found.llm == expected.llm
    assert found.notes == ()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 64}, r"says hidden_size 64, but model\.embed_tokens\.weight is \(62, 32\)"),
        ({"intermediate_size": 96}, r"says intermediate_size 96, but model\.layers\.0\.mlp\.gate_proj\.weight is"),
        ({"num_hidden_layers": 2}, "says num_hidden_layers 2, but the tensors hold 3 layers"),
        ({"num_hidden_layers": 4}, "says num_hidden_layers 4, but the tensors hold 3 layers"),
        ({"num_attention_heads": 8}, r"says num_attention_heads 8 and head_dim 8, but .*q_proj\.weight is \(32, 32\)"),
        ({"head_dim": 16}, "says num_attention_heads 4 and head_dim 16, but"),
        ({"head_dim": "8"}, "config"),
    ],
)
def test_a_config_of_another_model_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        detect(decoder("llama"), **change)


def test_stored_frequencies_determine_the_head_size():
    """Without them, four heads of 8 channels and eight of 4 look the same."""
    changed = {"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}
    assert detect(decoder("llama"), **changed).llm.head_dim == 4
    stored = layer_tensors("llama", "self_attn.rotary_emb.inv_freq", 4)
    with pytest.raises(UserError, match=r"inv_freq is \(4,\), but the config says heads of 4 channels"):
        detect(decoder("llama"), stored, **changed)
    assert detect(decoder("llama"), stored).llm.head_dim == 8


def test_biases_and_norms_follow_the_tensors():
    rows = {"q": 32, "k": 16, "v": 16}
    biases = {}
    for name, size in rows.items():
        biases |= layer_tensors("llama", f"self_attn.{name}_proj.bias", size)
    for found in (detect(decoder("llama"), biases), detect(decoder("qwen2"), without=biases)):
        assert found.llm.qkv_bias is ("have attention biases" in found.notes[0])
        assert len(found.notes) == 1
    assert detect(decoder("llama"), attention_bias=True).notes == (
        "The tensors have no attention biases, unlike the config; the tensors are used.",
    )
    assert "mlp_bias" in detect(decoder("llama"), mlp_bias=True).notes[0]
    norms = layer_tensors("llama", "self_attn.q_norm.weight", 8) | layer_tensors("llama", "self_attn.k_norm.weight", 8)
    found = detect(decoder("llama"), norms)
    assert found.llm.qk_norm
    assert "query and key norms" in found.notes[0]
    with pytest.raises(UserError, match=r"q_norm\.weight is missing"):
        detect(decoder("qwen3"), without=norms)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.bias \(32,\) is missing"):
        detect(decoder("qwen2"), without=["model.layers.1.self_attn.q_proj.bias"])


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_tower_sizes_follow_the_tensors(family):
    expected = detect(tower(family))
    for change, value in (({"image_size": 56}, 28), ({"patch_size": 14}, 7)):
        found = detect(tower(family), **change)
        ((key, configured),) = change.items()
        assert found.vision == expected.vision
        assert found.notes == (f"The config says {key} {configured}, but the tensors have {value}, which is used.",)
    assert detect(tower(family), image_size=30).vision.image_size == 30  # a size need not be a multiple of the patch
    for key, value, sentence in (
        ("hidden_size", 64, r"says hidden_size 64, but .*patch_embedding\.weight is \(128, 3, 7, 7\)"),
        ("intermediate_size", 64, "says intermediate_size 64, but"),
        ("num_hidden_layers", 3, "says num_hidden_layers 3, but the tensors hold 4 layers"),
        ("num_attention_heads", 3, "config.json does not describe a model|128 channels with 3 heads"),
    ):
        with pytest.raises(UserError, match=sentence):
            detect(tower(family), **{key: value})
    name = next(name for name in tower(family).state_dict() if name.endswith("position_embedding.weight"))
    with pytest.raises(UserError, match="patches, which is not a square number"):
        detect(tower(family), {name: torch.zeros(13, 128)})


def test_a_projector_must_fit_its_language_model():
    shapes = {"linear_1.weight": (48, 128), "linear_1.bias": 48, "linear_2.weight": (48, 48), "linear_2.bias": 48}
    state = {f"model.multi_modal_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(UserError, match="projector outputs 48 channels, but the language model has 32"):
        detect(llava(), state)


@pytest.mark.parametrize("key", ["image_token_id", "image_token_index"])
def test_rows_added_after_an_export_are_kept(key):
    config = {"stf_vocab": 59, "image_token_id": KeyError, "image_token_index": KeyError}
    found = detect(llava(), **config | {key: 61})
    assert (found.llm.vocab, found.notes) == (59, ())
    for image_id in (59, "61", KeyError):
        found = detect(llava(), **config | {key: image_id})
        assert found.llm.vocab == 62
        assert "resized since" in found.notes[0]
    for wrong in (63, "59", 0):
        with pytest.raises(UserError, match=f"says stf_vocab {wrong!r}"):
            detect(llava(), stf_vocab=wrong)


def test_llavas_patch_tokens_are_part_of_the_vocabulary():
    found = detect(llava(), mm_use_im_patch_token=True, mm_use_im_start_end=False)
    assert (found.llm.vocab, found.notes) == (62, ())


# ---- Unsupported weights ---------------------------------------------------------------------------------------------


QUANTIZED = {
    "gptq": {"q_proj.qweight": torch.int32, "q_proj.qzeros": torch.int32, "q_proj.scales": torch.float16},
    "bitsandbytes": {"q_proj.weight": torch.uint8, "q_proj.weight.absmax": torch.float32},
    "int8": {"q_proj.weight": torch.int8, "q_proj.SCB": torch.float32},
    "fp8": {"q_proj.weight": torch.float8_e4m3fn, "q_proj.weight_scale_inv": torch.float32},
    "compressed-tensors": {"q_proj.weight_packed": torch.int32, "q_proj.weight_scale": torch.bfloat16},
}


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_refused_with_the_fix(method, in_config):
    name = ATTENTION.format(0)
    state = {name + part: torch.zeros(4, 4, dtype=torch.float32).to(dtype) for part, dtype in QUANTIZED[method].items()}
    config = {"quantization_config": {"quant_method": method}} if in_config else {}
    with pytest.raises(
        UserError, match=f"are quantized{f' by {method}' if in_config else ''} .*import the unquantized"
    ):
        detect(
            decoder("llama"),
            state,
            without=[f"{name}q_proj.weight"] if f"{name}q_proj.weight" not in state else [],
            **config,
        )


def test_a_quantization_config_of_plain_tensors_is_ignored():
    found = detect(decoder("llama"), quantization_config={"quant_method": "awq", "bits": 4})
    assert found.llm == detect(decoder("llama")).llm
    assert found.notes == ("The config's quantization_config is ignored: no tensor is quantized.",)


def test_sections_of_a_composite_config_have_default_model_types():
    config = llava().config.to_dict()
    for key in ("text_config", "vision_config"):
        config[key] = {name: value for name, value in config[key].items() if name != "model_type"}
    found = detect(llava(), **config)
    assert (found.llm, found.vision, found.notes) == (detect(llava()).llm, detect(llava()).vision, ())


def test_mistrals_own_names_are_refused():
    with pytest.raises(UserError, match="names of Mistral's or Meta's own code"):
        detect_model(open_in_memory({"tok_embeddings.weight": torch.zeros(2, 2), "norm.weight": torch.zeros(2)}), {})


def test_an_embedding_alone_is_no_language_model():
    with pytest.raises(UserError, match="says num_hidden_layers 3, but the tensors hold 0 layers"):
        detect_model(open_in_memory({EMBEDDING: torch.zeros(62, 32)}), decoder("llama").config.to_dict())


def test_adapters_are_refused_by_their_tensors():
    for name in (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.q_proj.lora_B.default.weight",
    ):
        with pytest.raises(UserError, match="are a LoRA adapter's, not a complete model's: import the adap"):
            detect_model(open_in_memory({name: torch.zeros(2, 2)}), {})


def test_integer_weights_are_refused():
    with pytest.raises(UserError, match=r"model\.norm\.weight has type int64, which is not a floating-point type"):
        detect(decoder("llama"), {"model.norm.weight": torch.zeros(32, dtype=torch.int64)})


def test_a_missing_config_is_refused(tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "w", decoder("llama").state_dict())
    (folder / "config.json").write_text('{"vocab_size": 62}')
    for sentence in ("config.json has no model_type", "config.json is missing"):
        text = f"{folder}: {sentence}" if "missing" in sentence else sentence
        assert run_command(main, ["import", str(folder), f"--to={tmp_path / 'imported'}"]) == 2
        assert text in capsys.readouterr().err
        (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("damage", ["adapter", "link"])
def test_opening_and_importing_give_the_same_error(tmp_path, damage):
    folder = save_checkpoint(tmp_path / "w", decoder("llama").state_dict())
    if damage == "adapter":
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("../../blobs/0123")
    sentences = []
    for read in (lambda: open_model(epath.Path(folder)), lambda: import_weights(str(folder), tmp_path / "imported")):
        with pytest.raises(UserError) as raised:
            read()
        sentences.append(str(raised.value))
    assert sentences[0] == sentences[1]
    assert ("import it with its base" if damage == "adapter" else "is a link to") in sentences[0]


# ---- Types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [("float16", "float32", "float32"), ("float32", "bfloat16", "float16")])
def test_layers_of_different_types_lose_no_precision(tmp_path, types):
    state = dict(decoder("llama").state_dict())
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    for name, dtype in zip(names, types, strict=True):
        state[name] = (state[name] * 1e5 if dtype == "float32" else state[name]).to(getattr(torch, dtype))
    report = import_weights(str(save_checkpoint(tmp_path / "w", state)), tmp_path / "imported")
    for folder in ("w", "imported"):
        read = open_model(tmp_path / folder).read("llm/blocks/mlp/up/kernel")
        assert read.dtype == np.float32
        for layer, name in enumerate(names):
            np.testing.assert_array_equal(read[layer].T, state[name].float().numpy())
    assert sorted(report["cast"]) == sorted({f"{dtype} to float32" for dtype in types} - {"float32 to float32"})


def test_overflowing_values_are_counted_and_reported(tmp_path, capsys):
    state = dict(decoder("llama").state_dict())
    overflowed = {EMBEDDING: 3, "model.layers.1.mlp.up_proj.weight": 2}
    for name, count in overflowed.items():
        state[name] = state[name].clone()
        state[name].view(-1)[:count] = 65520.0  # rounds to infinity; smaller values do not
        state[name].view(-1)[-1] = 65519.0
    state[HEAD] = state[HEAD].clone()
    state[HEAD][0, 0] = torch.inf  # infinite before the cast
    folder = save_checkpoint(tmp_path / "w", state)
    assert run_command(main, ["import", str(folder), f"--to={tmp_path / 'half'}", "--dtype=float16"]) == 0
    assert "WARNING: 5 values of 2 tensors (model." in capsys.readouterr().out
    assert json.loads((tmp_path / "half" / "import.json").read_text())["overflowed"] == overflowed
    assert np.isinf(open_model(tmp_path / "half").read("llm/embedding")).sum() == 3
    report = import_weights(str(folder), tmp_path / "bfloat16", dtype="bfloat16")
    assert report["overflowed"] == {}
    out = tmp_path / "out"
    assert (
        run_command(main, ["export", str(tmp_path / "bfloat16"), "--format=native", "--dtype=float16", f"--to={out}"])
        == 0
    )
    assert "WARNING: 7 values of 2 tensors (llm/" in capsys.readouterr().out  # 65519 is 65536 in bfloat16
