"""Imports of GGUF files in the layout of llama.cpp's converter, compared with the transformers models in them."""

import functools
import json
import re
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, traverse_util
from hard_texts import IDENTITY, make_texts, train_sentencepiece
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.convert import main
from stf_jax.data.tokenizer import load_tokenizer
from stf_jax.models.decoders.transformer import Decoder
from stf_jax.weights.gguf import open_gguf
from stf_jax.weights.gguf_tokenizer import read_gguf_tokenizer
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model

TEXT = {"vocab_size": 62, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-3, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "llama-3": (LlamaForCausalLM, LlamaConfig(**TEXT, rope_parameters=LLAMA3)),
    "llama-linear": (
        LlamaForCausalLM,
        LlamaConfig(**TEXT, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**TEXT)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**TEXT)),
}
LAYER_NAMES = {  # transformers' names in a layer → llama.cpp's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@functools.cache
def model(name):
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    reference = model_class(config).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(torch.randn(p.shape) * (0.7 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2))
    return reference


def write(file, name, kind=gguf.GGMLQuantizationType.F32, **fields):
    """Writes the model as a GGUF file, with matrices of the given type."""
    reference = model(name)
    config = reference.config
    arch = config.model_type
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if arch != "qwen2" else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(256)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", make_divisors(16, 1e4, 8.0))
    for key, value in fields.items():
        writer.add_uint32(key, value)
    for key, value in reference.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value, target = value.numpy(), to_gguf_name(key)
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            # Each head's rows in the order 0, half, 1, half + 1, …
            heads = value.shape[0] // 16
            order = np.arange(16).reshape(2, 8).T.ravel()
            value = value.reshape(heads, 16, *value.shape[1:])[:, order].reshape(value.shape)
        if value.ndim > 1:
            writer.add_tensor(target, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def to_gguf_name(key):
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    base, _, end = key.rpartition(".")
    if base in names:
        return f"{names[base]}.{end}"
    layer, part = base.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{end}"


def make_divisors(size, theta, factor):
    """Llama 3.1's divisors, as published: long wavelengths (> 8192) are divided, short ones (< 2048) are not."""
    divisors = []
    for i in range(0, size, 2):
        length = 2 * np.pi * theta ** (i / size)
        smooth = min(max((8192 / length - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def load_logits(folder):
    """Returns a compiled function from ids [B, T] to our model's logits."""
    saved = open_model(folder)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(nnx.Rngs(0), saved.description.llm)))
    params = {path.removeprefix("llm/"): jnp.asarray(saved.read(path), jnp.float32) for path in saved.shapes}
    decoder = nnx.merge(graph, traverse_util.unflatten_dict(params, sep="/"))

    @jax.jit
    def run(ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return decoder.logits(decoder(decoder.embed(ids, jnp.float32), positions, None))

    return lambda ids: np.asarray(run(ids))


@pytest.mark.parametrize("name", MODELS)
def test_logits_match(tmp_path, name):
    write(tmp_path / "model.gguf", name)
    import_weights(str(tmp_path), tmp_path / "imported")
    ids = np.random.default_rng(0).integers(0, 62, (2, 40))
    with torch.no_grad():
        expected = model(name)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(load_logits(tmp_path / "imported")(ids), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_values_are_those_of_the_quantized_blocks(tmp_path, kind):
    """Restored rows have the values that the gguf package reads from the permuted ones."""
    kind = gguf.GGMLQuantizationType[kind]
    file = write(tmp_path / "model.gguf", "llama", kind)
    tensors, _ = open_gguf(file)
    dtype = {"F16": np.float16, "BF16": jnp.bfloat16}.get(kind.name)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        read = tensors.read(f"model.layers.1.{name}.weight")
        expected = model("llama").state_dict()[f"model.layers.1.{name}.weight"].numpy()
        # Blocks lie along rows, so permuting rows commutes with quantizing them.
        np.testing.assert_array_equal(
            read.astype(np.float32), gguf.dequantize(gguf.quantize(expected, kind), kind).reshape(expected.shape)
        )
        assert read.dtype == (dtype or np.float32)
        assert tensors.dtype(f"model.layers.1.{name}.weight") == (np.dtype(dtype).name if dtype else kind.name)


def test_the_report_lists_dequantized_tensors(tmp_path):
    write(tmp_path / "model.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    report = import_weights(str(tmp_path / "model.gguf"), tmp_path / "imported", dtype="bfloat16")
    counts = {kinds: len(names) for kinds, names in report["cast"].items()}
    assert counts == {"Q8_0 to bfloat16": 2 * 7 + 2, "float32 to bfloat16": 2 * 2 + 1}
    assert report["unused"] == {}
    assert "No tokenizer was imported" in report["notes"][0]


def import_error(capsys, source, to):
    assert run_command(main, ["import", str(source), f"--to={to}"]) == 2
    assert not to.exists()
    return capsys.readouterr().err


def test_errors_name_unusable_files(tmp_path, capsys):
    content = write(tmp_path / "model.gguf", "llama").read_bytes()
    cut, to = tmp_path / "cut.gguf", tmp_path / "imported"
    for length in (0, 3, 100, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        assert "cut.gguf" in import_error(capsys, cut, to), length
    cut.write_bytes(b"no gguf at all" * 100)
    assert "cut.gguf cannot be read as GGUF" in import_error(capsys, cut, to)
    assert "holds 2 GGUF files" in import_error(capsys, tmp_path, to)
    write(cut, "llama", **{"split.count": 3})
    assert "one of 3 parts" in import_error(capsys, cut, to)
    writer = gguf.GGUFWriter(cut, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "architecture 'mamba'" in import_error(capsys, cut, to)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.head_count_kv", 4), ("attention.head_count_kv", 1), ("vocab_size", 70), ("vocab_size", 60)],
)
def test_tensors_override_the_files_metadata(tmp_path, key, value):
    """The rows of keys are reordered with the tensor's number of heads, not the file's."""
    file = write(tmp_path / "model.gguf", "llama", **{f"llama.{key}": value})
    report = import_weights(str(file), tmp_path / "imported")
    assert len(report["notes"]) == 2  # and that there is no tokenizer
    assert f" {value}, but the tensors have {62 if key == 'vocab_size' else 2}" in report["notes"][0]
    keys = model("llama").state_dict()["model.layers.0.self_attn.k_proj.weight"].numpy()  # [K·Dh, D]
    read = open_model(tmp_path / "imported").read("llm/blocks/attention/key/kernel")[0]  # [D, K, Dh]
    np.testing.assert_array_equal(read.reshape(64, 32).T, keys)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("rope.dimension_count", 8, "rotates 8 of a head's 16 channels"),
        ("block_count", 1, "blk.1.\\S+ is unexpected"),
        ("block_count", 3, "says num_hidden_layers 3, but the tensors hold 2 layers"),
        ("embedding_length", 32, "says hidden_size 32, but"),
        ("feed_forward_length", 48, "says intermediate_size 48, but"),
        ("attention.head_count", 8, "says num_attention_heads 8 and head_dim 16, but"),
        ("attention.key_length", 8, "says num_attention_heads 4 and head_dim 8, but"),
    ],
)
def test_wrong_sizes_in_the_metadata_are_refused(tmp_path, key, value, sentence):
    file = write(tmp_path / "model.gguf", "llama", **{f"llama.{key}": value})
    with pytest.raises(UserError, match=sentence):
        import_weights(str(file), tmp_path / "imported")


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def write_tokenizer(file, kind, tokens, kinds, **values):
    """Writes a GGUF file with only a vocabulary."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for key, value in values.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def encode_as_text(tokenizer, texts):
    """Tokenizes texts with names of special tokens as plain text."""
    return [tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]


def test_a_sentencepiece_vocabulary_gives_sentencepieces_ids(tmp_path):
    model = train_sentencepiece(tmp_path, **IDENTITY)
    ids, kinds = range(model.get_piece_size()), [1] * model.get_piece_size()
    for i in ids:
        kinds[i] = 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
    tokens, scores = [model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids]
    file = write_tokenizer(tmp_path / "a.gguf", "llama", tokens, kinds, token_scores=scores, eos_token_id=2)
    tokenizer = read_gguf_tokenizer(file)
    texts = make_texts(500, seed=5)
    assert encode_as_text(tokenizer, texts) == model.encode(texts)
    assert tokenizer("a  b").input_ids == [1, *model.encode("a  b")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    flat = write_tokenizer(tmp_path / "b.gguf", "llama", tokens, kinds, token_scores=[-1000.0] * len(ids))
    with pytest.raises(ValueError, match="has no scores"):
        read_gguf_tokenizer(flat)


def test_a_vocabulary_like_llama_3s_gives_the_original_ids(tmp_path, llama_3):
    values = json.loads(llama_3.backend_tokenizer.to_str())
    tokens = llama_3.convert_ids_to_tokens(range(len(llama_3)))
    kinds = [3 if i in llama_3.added_tokens_decoder else 1 for i in range(len(tokens))]
    fields = {
        "token_merges": [" ".join(merge) for merge in values["model"]["merges"]],
        "tokenizer_pre": "llama-bpe",
        "bos_token_id": 0,
        "eos_token_id": 4,
        "chat_template": "{{ messages[0].content }}",
    }
    tokenizer = read_gguf_tokenizer(write_tokenizer(tmp_path / "a.gguf", "gpt2", tokens, kinds, **fields))
    texts = [*make_texts(500, seed=6), "He said:  'We've 1234 cats.'\n\n\n A.\n"]
    assert encode_as_text(tokenizer, texts) == encode_as_text(llama_3, texts)
    assert tokenizer("A cat<|eot_id|>").input_ids == [0, *llama_3("A cat", add_special_tokens=False).input_ids, 4]
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|eot_id|>", fields["chat_template"])


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        ("bert", {}, "a vocabulary of kind 'bert'; supported: 'llama', 'gpt2'"),
        ("gpt2", {"tokenizer_pre": "poro-chat"}, "has the pre-tokenizer 'poro-chat', which is not supported"),
        ("gpt2", {"eos_token_id": 9}, "eos token is 9, but it has 2 tokens"),
    ],
)
def test_unsupported_vocabularies_are_refused(tmp_path, kind, values, sentence):
    file = write_tokenizer(tmp_path / "a.gguf", kind, ["a", "b"], [1, 1], **values)
    with pytest.raises(ValueError, match=sentence):
        read_gguf_tokenizer(file)


# ---- SmolLM2-135M ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf, tmp_path_factory):
    """Returns its GGUF file and the folder of its import."""
    folder = tmp_path_factory.mktemp("smollm2") / "imported"
    import_weights(str(smollm2_gguf), folder)
    return smollm2_gguf, folder


@pytest.mark.slow  # transformers reads the file's 98,000 strings slowly
def test_smollm2s_tokenizer_matches_transformers(smollm2_gguf):
    tokenizer = read_gguf_tokenizer(smollm2_gguf)
    reference = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # transformers does not separate this model's digits from the spaces before them.
    texts = [text for text in make_texts(1000, seed=7) if not re.search(r"\s\s\d", text)]
    assert len(texts) > 800
    assert encode_as_text(tokenizer, texts) == encode_as_text(reference, texts)
    assert tokenizer.tokenize("a  1") == ["a", "\u0120\u0120", "1"]
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "added_tokens_decoder"):
        assert getattr(tokenizer, name) == getattr(reference, name)
    assert tokenizer("").input_ids == reference("").input_ids


@pytest.mark.slow  # the file is read in a separate process
def test_smollm2s_tokenizer_is_imported_without_torch(smollm2_gguf, tmp_path):
    code = "import sys, pathlib; sys.modules['torch'] = None; from stf_jax.weights.imports import _save_tokenizer; "
    code += f"print(repr(_save_tokenizer(pathlib.Path({str(smollm2_gguf)!r}), pathlib.Path({str(tmp_path)!r}))))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "''\n"
    assert load_tokenizer(str(tmp_path)).tokenize("What is it?") == ["What", "\u0120is", "\u0120it", "?"]


@pytest.mark.slow  # a minute
def test_smollm2_knows_the_capital_of_france(smollm2):
    file, folder = smollm2
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    logits, row, length = load_logits(folder), np.zeros((1, 64), np.int32), len(ids)
    row[0, :length] = ids
    while length < 64 and row[0, length - 1] != tokenizer.eos_token_id:
        row[0, length] = logits(row)[0, length - 1].argmax()
        length += 1
    assert tokenizer.decode(row[0, len(ids) : length - 1]) == "The capital of France is Paris."

    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(row[:, :length]).long()).logits[0].numpy()
    np.testing.assert_allclose(logits(row)[0, :length], expected, atol=1e-5 * np.abs(expected).max())
