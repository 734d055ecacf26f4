"""Exports loaded by transformers in PyTorch, compared with the models that they were made from."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from make_models import CONTROL, DECODERS, LLAMA, TOWERS, load, make, make_image, to_uint8, turn
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from stf_jax.cli import run_command
from stf_jax.config import FusionConfig, MeshConfig, UserError
from stf_jax.convert import main
from stf_jax.data.conversation import CHATS, encode, template_items
from stf_jax.data.image import to_square
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import MINIATURE, load_tokenizer
from stf_jax.evals.verify import verify
from stf_jax.models.blueprint import blueprint
from stf_jax.models.spec import resolve_model
from stf_jax.parallel.mesh import compute_context, make_mesh
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model

pytestmark = pytest.mark.usefixtures("torch_setup")

CASES = {
    "the paper's": (FusionConfig("mbtf_stf"), "clip", "llama"),
    "the figure's": (FusionConfig("mbtf_stf", variant="paper", taps=(4, 2)), "siglip", "qwen3"),
    "widths": (FusionConfig("mbtf_stf", (3, 1, 0), 3, 40, 24, 56), "siglip", "llama-3"),
    "stf": (FusionConfig("stf"), "siglip", "qwen2"),
    "stf, figure": (FusionConfig("stf", variant="paper", kernel=3), "clip", "linear"),
    "mbtf": (FusionConfig("mbtf"), "clip", "llama"),
    "mbtf, figure": (FusionConfig("mbtf", variant="paper"), "clip", "qwen3"),
    "padded": (FusionConfig("mbtf_stf", kernel=4, pad_grid=True), "clip", "llama"),
    "avg_pool": (FusionConfig("avg_pool"), "clip", "qwen2"),
    "pixel_shuffle": (FusionConfig("pixel_shuffle", kernel=4, pad_grid=True), "siglip", "llama"),
    "ldp_v2": (FusionConfig("ldp_v2", kernel=3), "siglip", "llama"),
    "c_abstractor": (FusionConfig("c_abstractor", depth=2), "clip", "llama"),
    "resampler": (FusionConfig("resampler", kernel=4, pad_grid=True), "siglip", "llama"),
    "token_packer": (FusionConfig("token_packer"), "clip", "llama"),
    "token_packer, padded": (FusionConfig("token_packer", (3, 1), 4, pad_grid=True), "siglip", "qwen3"),
    "mlp": (FusionConfig("mlp"), "clip", "llama"),
    "mlp, tied": (FusionConfig("mlp", taps=(2,)), "siglip", "qwen3"),
}


BUDGETS = {
    "pools": (FusionConfig("mlp", budgets=(36, 4)), "clip", "llama"),
    "nested windows": (FusionConfig("mbtf_stf", budgets=(36, 1)), "siglip", "qwen2"),
    "queries": (FusionConfig("mqt", budgets=(9, 2)), "clip", "llama"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns a function from a case to the folders of the model and of its export."""

    @functools.cache
    def export(case, **settings):
        root = tmp_path_factory.mktemp("case")
        folder = make(root / "model", *(CASES | BUDGETS)[case], **settings)
        export_hf(folder, root / "export")
        return folder, root / "export"

    return export


@functools.cache
def load_logits(folder, tokens=0):
    """Returns a compiled function to our model's logits, at one of its budgets."""
    saved = open_model(folder)
    plan = blueprint(dataclasses.replace(saved.config, precision="float32", remat="none", tokens=tokens))
    mesh = make_mesh(MeshConfig(1, 1, 1))
    shardings = plan.shardings(mesh)
    params = {path: jax.device_put(saved.read(path).astype(np.float32), shardings[path]) for path in plan.shapes}

    @jax.jit
    def run(params, tokens, slots, images):
        return plan.merge(params)(tokens, jnp.arange(tokens.shape[1])[None], None, slots, images)

    def call(tokens, slots, images):
        with compute_context(mesh, "float32"):
            return np.array(run(params, tokens, slots, images))

    return call


def our_logits(folder, ids, is_image, images, budget=0):
    """Our model's logits of one row of ids [T] with images uint8 [M, H, W, 3], two at most."""
    length = -(-len(ids) // 64) * 64  # fewer lengths, fewer compilations
    tokens, slots = np.zeros((1, length), np.int32), np.full((1, length), -1, np.int32)
    tokens[0, : len(ids)] = np.where(is_image, 0, ids)
    slots[0, : len(ids)] = np.where(is_image, np.cumsum(is_image) - 1, -1)
    pixels = np.zeros((1, 2, 36, 36, 3), np.uint8)
    for i, image in enumerate(images):
        pixels[0, i] = image
    return load_logits(folder, budget)(tokens, slots, pixels)[0, : len(ids)]


def build_prompt(processor, *turns, **kwargs):
    return processor.apply_chat_template(
        list(turns), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


# ---- Logits and generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_match(exported, case):
    folder, export = exported(case)
    model, processor = load(export)
    assert isinstance(model, LlavaForConditionalGeneration) == case.startswith("mlp")
    images = [make_image(1), make_image(2, (36, 80))]
    inputs = build_prompt(processor, turn("Which of them is red?", *images))
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
    ids = inputs["input_ids"][0].numpy()
    is_image = ids == processor.image_token_id
    saved = open_model(folder)
    assert is_image.sum() == 2 * resolve_model(saved.config).slots
    squares = to_uint8(inputs, saved.description.vision)
    np.testing.assert_allclose(
        logits[:, : saved.description.llm.vocab], our_logits(folder, ids, is_image, squares), atol=1e-4
    )


@pytest.mark.parametrize("case", ["pools", "nested windows", "queries"])
def test_a_request_chooses_its_budget(exported, case):
    """The model follows the placeholders, or its own argument."""
    folder, export = exported(case)
    model, processor = load(export)
    budgets = open_model(folder).config.fusion.budgets
    text = processor.apply_chat_template([turn("Which?", *[make_image(1)] * 2)], add_generation_prompt=True)
    for tokens in (None, *budgets[1:]):
        images = [make_image(1), make_image(2, (36, 80))]
        inputs = processor(images, text, num_image_tokens=tokens, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0].numpy()
            generated = model.generate(
                **inputs, num_image_tokens=tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False
            )
        ids = inputs["input_ids"][0].numpy()
        is_image = ids == processor.image_token_id
        assert is_image.sum() == 2 * (tokens or budgets[0])
        squares = to_uint8(inputs, open_model(folder).description.vision)
        ours = our_logits(folder, ids, is_image, squares, tokens or 0)
        np.testing.assert_allclose(logits[:, : ours.shape[1]], ours, atol=1e-4)
        assert generated[0, len(ids)] == ours[-1, : processor.image_token_id].argmax()
    with pytest.raises(ValueError, match="num_image_tokens=8 is not among "):
        processor(images, text, num_image_tokens=8)
    with pytest.raises(ValueError, match="tokens per image, not 8"):
        model.get_image_features(inputs["pixel_values"], num_image_tokens=8)


@pytest.mark.parametrize("case", ["the paper's", "widths", "mlp"])
def test_generation_matches_in_left_padded_batches(exported, case):
    """Sixteen prompts with and without images; each new token is our model's greedy choice."""
    folder, export = exported(case)
    model, processor = load(export)
    texts, images = [], []
    for i in range(16):
        own_images = [make_image(10 * i + j) for j in range((0, 1, 1, 2)[i % 4])]
        text = "Which " + "very " * (i % 5) + "odd thing is it?"
        texts.append(
            processor.apply_chat_template([turn(text, *own_images)], add_generation_prompt=True, tokenize=False)
        )
        images.append(own_images)
    flat = [image for own_images in images for image in own_images]
    inputs = processor(text=texts, images=flat, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        uncached = model.generate(**inputs, max_new_tokens=64, do_sample=False, use_cache=False)
    assert torch.equal(output, uncached)
    vision = open_model(folder).description.vision
    start, squares = inputs["input_ids"].shape[1], iter(to_uint8(inputs, vision))
    for row, mask, own_images in zip(output.numpy(), inputs["attention_mask"].numpy(), images, strict=True):
        ids = row[start - mask.sum() :]
        logits = our_logits(folder, ids, ids == processor.image_token_id, [next(squares) for _ in own_images])
        logits[:, processor.image_token_id :] = -np.inf  # suppressed by the export's generation config
        choices = logits.argmax(-1)[-65:-1]
        assert len(choices) == 64
        assert choices.tolist() == ids[-64:].tolist()


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *(("float32", case) for case in ("the figure's", "c_abstractor", "resampler", "token_packer", "mlp, tied")),
        *(("bfloat16", case) for case in ("the paper's", "pixel_shuffle", "mlp")),
    ],
)
def test_a_round_trip_is_exact(tmp_path, case, dtype):
    """Exporting, importing and exporting again gives the same model under the same names."""
    first = make(tmp_path / "model", *CASES[case], dtype, aspect="pad")
    report = export_hf(first, tmp_path / "hf")
    import_weights(str(tmp_path / "hf"), tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "hf-again")
    before, after = open_model(first), open_model(tmp_path / "again")
    assert report["unused"] == []
    assert after.shapes == before.shapes
    for path in before.shapes:
        np.testing.assert_array_equal(before.read(path).view(np.uint8), after.read(path).view(np.uint8))
    for part in ("vision", "llm", "template", "aspect"):
        assert getattr(after.description, part) == getattr(before.description, part)
    exported, reexported = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf-again"))
    assert exported.keys() == reexported.keys()
    assert all(torch.equal(exported[name], reexported[name]) for name in exported)
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (tmp_path / "hf-again" / name).read_text()


def test_an_export_without_its_tower_needs_another(exported, tmp_path):
    folder, export = exported("the paper's")
    bare = shutil.copytree(export, tmp_path / "bare")
    state = load_file(export / "model.safetensors")
    state = {name: value for name, value in state.items() if not name.startswith("model.vision_tower.")}
    save_file(state, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"bare: The export has no vision tower: give .* as --vision=DIR"):
        import_weights(str(bare), tmp_path / "no")
    import_weights(str(bare), tmp_path / "again", vision=str(export))
    before, after = open_model(folder), open_model(tmp_path / "again")
    assert after.shapes == before.shapes
    for path in before.shapes:
        np.testing.assert_array_equal(after.read(path), before.read(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_half_precision_and_kernels(exported, dtype, kernel):
    model, processor = load(exported("the paper's")[1], dtype=dtype, attn_implementation=kernel)
    full, _ = load(exported("the paper's")[1], attn_implementation="eager")
    assert {
        module.config._attn_implementation for module in (model.model.language_model, model.model.vision_tower)
    } == {kernel}
    inputs = build_prompt(processor, turn("What?", make_image(1)))
    with torch.no_grad():
        logits, exact = model(**inputs).logits.float(), full(**inputs).logits
        assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
        assert model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4


def test_an_export_can_be_trained_in_pytorch(exported):
    model, processor = load(exported("the paper's")[1])
    model.model.vision_tower.requires_grad_(False)
    inputs = build_prompt(processor, turn("What?", make_image(1)))
    labels = torch.where(inputs["input_ids"] == processor.image_token_id, -100, inputs["input_ids"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.mm_projector_crosslayer.parameters()
        )
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.mm_projector.parameters())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    model.gradient_checkpointing_enable()
    model.train()
    model(**inputs, labels=labels).loss.backward()


def test_verify_compares_answers(exported):
    folder, export = exported("the paper's")
    pairs = verify(folder, export, num_questions=3, max_new_tokens=8)
    assert len(pairs) == 3
    assert all(pair.jax and pair.jax == pair.pytorch for pair in pairs)


def test_verify_reports_differences_and_errors(exported, tmp_path, capsys, monkeypatch):
    folder, export = exported("mlp")
    monkeypatch.setattr("stf_jax.evals.verify._answer_in_jax", lambda folder, questions, limit: ["x"] * len(questions))

    def run_verify(export, *options):
        status = run_command(main, ["verify", str(folder), str(export), "--tokens=2", "--questions=2", *options])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()[-1]

    status, out, err = run_verify(export)
    assert (status, err) == (2, f"error: {export} and {folder} give different answers.")
    assert len(out.splitlines()) == 4
    assert out.endswith("0 of 2 answers are the same.\n")
    assert run_verify(export, "--questions=0")[2] == "error: --questions and --tokens must be at least 1."
    assert run_verify(folder)[2] == f"error: {folder} holds no weights: neither *.safetensors, *.bin nor *.gguf."
    torn = shutil.copytree(export, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:-100])
    assert run_verify(torn)[2].startswith(f"error: {torn}/model.safetensors ")


# ---- Prompts and images ----------------------------------------------------------------------------------------------


def encode_prompt(folder, tokenizer, template, turns, images):
    slots = resolve_model(open_model(folder).config).slots
    return encode(template_items(template, Record("a", images, turns)), tokenizer, slots)


STOPS = {"llama-3": ["<|eot_id|>"], "chatml": ["<|im_end|>"]}


@pytest.fixture(scope="module")
def tokenizers(llama, tmp_path_factory):
    """Returns a function from a kind to a tokenizer with the control tokens of all templates."""

    @functools.cache
    def get(kind):
        tokenizer = load_tokenizer(str(MINIATURE if kind == "miniature" else llama.name_or_path))
        tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
        if kind.endswith("not legacy"):
            tokenizer.init_kwargs["legacy"] = False
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(folder)
        return load_tokenizer(str(folder))

    return get


@pytest.fixture
def export_without_weights(exported, tmp_path, monkeypatch):
    """Returns a function that exports a case's model with another template, aspect or tokenizer, but no weights.

    It returns the folders of the model and of its export.
    """

    def export(case, tokenizer=None, **changes):
        folder = shutil.copytree(exported(case)[0], tmp_path / "model")
        # After the export that other tests share was made.
        monkeypatch.setattr("stf_jax.weights.export_hf.write_shards", lambda folder, tensors: None)
        dataclasses.replace(open_model(folder).description, **changes).save(folder)
        if tokenizer is not None:
            shutil.rmtree(folder / "tokenizer")
            shutil.copytree(tokenizer.name_or_path, folder / "tokenizer")
        export_hf(folder, tmp_path / "hf")
        return folder, tmp_path / "hf"

    return export


def load_processor(export):
    return AutoProcessor.from_pretrained(export, trust_remote_code=True)


@pytest.mark.parametrize(
    ("case", "kind", "template"),
    [
        *itertools.product(("the paper's", "mlp"), ("miniature", "llama"), CHATS),
        # Its later rounds continue without SentencePiece's space.
        ("the paper's", "llama, not legacy", "v1"),
        ("mlp", "llama, not legacy", "v1"),
        ("mlp", "llama, not legacy", "chatml"),
    ],
)
def test_prompts_match_to_the_token(export_without_weights, tokenizers, case, kind, template):
    tokenizer = tokenizers(kind)
    folder, export = export_without_weights(case, tokenizer, template=template)
    processor = load_processor(export)
    images = (make_image(1), make_image(2), make_image(3))
    messages = (
        turn("  Compare\nthem all. ", *images[:2]),
        {"role": "assistant", "content": [{"type": "text", "text": " One is red. "}]},
        turn("Which?"),
        {"role": "assistant", "content": "Straße 🤗"},
        turn("And now?", images[2]),
    )
    turns = (
        Turn("human", "<image>\n  Compare\nthem all. <image>"),
        Turn("gpt", "One is red."),
        Turn("human", "Which?"),
        Turn("gpt", "Straße 🤗"),
        Turn("human", "<image>\nAnd now?"),
    )
    inputs = build_prompt(processor, *messages)
    expected = encode_prompt(folder, tokenizer, template, turns, images)
    is_image = inputs["input_ids"][0].numpy() == processor.image_token_id
    assert is_image.tolist() == expected.is_image.tolist()
    assert inputs["input_ids"][0].numpy()[~is_image].tolist() == expected.tokens[~is_image].tolist()
    assert inputs["attention_mask"].all()
    # Rendering the template and tokenizing it gives the same, with the processor and as servers do.
    rendered = processor.apply_chat_template(list(messages), add_generation_prompt=True)
    assert processor(text=[rendered], images=list(images))["input_ids"] == inputs["input_ids"].tolist()
    expanded = rendered.replace("<image>", "<image>" * (int(is_image.sum()) // 3))
    assert processor.tokenizer(expanded, add_special_tokens=False).input_ids == inputs["input_ids"][0].tolist()
    # A conversation that ends with an answer, as for training in PyTorch.
    full = processor.apply_chat_template(list(messages[:4]), tokenize=True, return_dict=True)["input_ids"][0]
    expected = encode_prompt(folder, tokenizer, template, turns[:4], images[:2])
    assert [i for i in full if i != processor.image_token_id] == expected.tokens[~expected.is_image].tolist()
    # Only an image; if the template writes spaces, also with the export's tokenizer.
    alone = build_prompt(processor, turn("", make_image(1)))["input_ids"][0]
    turns = (Turn("human", "<image>"),)
    for candidate in (tokenizer, *([load_tokenizer(str(export))] if kind.endswith("legacy") else [])):
        expected = encode_prompt(folder, candidate, template, turns, images[:1])
        assert alone[alone != processor.image_token_id].tolist() == expected.tokens[~expected.is_image].tolist()
    # Releases before 5 have another key for these.
    values = json.loads((export / "tokenizer_config.json").read_text())
    assert set(CONTROL) <= set(values["additional_special_tokens"])
    assert "extra_special_tokens" not in values
    # Answers end with the same tokens, and untrained tokens are suppressed: <image>, whose id follows the control
    # tokens, and the rows beyond it (the model has 512; the miniature tokenizer has 501 tokens and 5 control tokens).
    generation = json.loads((export / "generation_config.json").read_text())
    ends = [*STOPS.get(template, []), "</s>"]
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(ends)
    suppressed = list(range(506, 512)) if kind == "miniature" else [32_005]
    assert generation["suppress_tokens"] == suppressed


@pytest.mark.parametrize("template", [*CHATS, "plain"])
def test_system_messages_are_encoded_as_in_training(export_without_weights, tokenizers, template):
    tokenizer = tokenizers("miniature")
    folder, export = export_without_weights("the paper's", tokenizer, template=template)
    processor = load_processor(export)
    messages = (turn("What?"), {"role": "assistant", "content": "A cat."}, turn("Sure?"))
    turns = (Turn("human", "What?"), Turn("gpt", "A cat."), Turn("human", "Sure?"))
    system = {"role": "system", "content": [{"type": "text", "text": ' Say "no".\n'}]}
    if template == "plain":
        with pytest.raises(Exception, match="trained without system messages"):
            processor.apply_chat_template([system, *messages])
        return
    for text, message in (' Say "no".\n', system), (" ", {"role": "system", "content": " "}):
        inputs = build_prompt(processor, message, *messages)
        expected = encode_prompt(folder, tokenizer, template, (Turn("system", text), *turns), ())
        assert inputs["input_ids"][0].tolist() == expected.tokens.tolist()


def test_a_template_needs_its_control_tokens(tmp_path, capsys):
    folder = make(tmp_path / "model", *CASES["the paper's"], template="chatml")
    assert run_command(main, ["export", str(folder), "--format=hf", f"--to={tmp_path / 'hf'}"]) == 2
    assert "'chatml' needs the token <|im_start|>" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_caption_prompts_match_training(export_without_weights):
    folder, export = export_without_weights("the paper's", template="plain")
    processor = load_processor(export)
    messages = (turn("Describe.", make_image(1)), {"role": "assistant", "content": "A cat. "})
    ids = processor.apply_chat_template(list(messages), tokenize=True, return_dict=True)["input_ids"][0]
    turns = (Turn("human", "Describe.\n<image>"), Turn("gpt", "A cat. "))
    tokenizer = load_tokenizer("miniature")
    expected = encode_prompt(folder, tokenizer, "plain", turns, (make_image(1),))
    generation = json.loads((export / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [
        expected.tokens[-1],
        tokenizer.eos_token_id,
    ]  # the newline that ends a caption
    assert [i for i in ids if i != processor.image_token_id] == expected.tokens[~expected.is_image].tolist()


@pytest.mark.parametrize("case", ["the paper's", "widths"])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_images_match(export_without_weights, case, aspect):
    processor = load_processor(export_without_weights(case, aspect=aspect)[1])
    config = TOWERS[CASES[case][1]]
    for size in ((36, 36), (50, 41), (41, 50), (20, 97), (200, 30)):
        image = make_image(3, size)
        inputs = build_prompt(processor, turn("What?", image))
        values = inputs["pixel_values"][0].permute(1, 2, 0).numpy()
        expected = to_square(image, config, aspect)
        difference = np.abs(to_uint8(inputs, config)[0].astype(int) - expected)
        assert difference.max() <= 1  # rounding, in few pixels
        assert (difference > 0).mean() < 0.02
        np.testing.assert_allclose(
            values, (to_uint8(inputs, config)[0] / 255 - np.array(config.mean)) / np.array(config.std), atol=1e-6
        )


def test_images_and_placeholders_must_match(exported):
    model, processor = load(exported("the paper's")[1])
    with pytest.raises(ValueError, match="1 <image>, but there are 2 images"):
        processor(text="<image> What?", images=[make_image(1), make_image(2)])
    with pytest.raises(ValueError, match="1 <image>, but there are 0 images"):
        processor(text="<image> What?")
    inputs = processor(text="<image> What?", images=make_image(1), return_tensors="pt")
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="placeholders for"):
        model(input_ids=inputs["input_ids"][:, 3:], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="Truncation is not supported"):
        processor(text="What?", truncation=True, max_length=4)


def test_the_processor_gives_servers_the_image_positions(exported):
    _, processor = load(exported("the paper's")[1])
    assert processor._get_num_multimodal_tokens([(10, 10), (5, 7)])["num_image_tokens"] == [9, 9]
    assert processor(images=[make_image(1), make_image(2)], return_tensors="pt")["pixel_values"].shape == (2, 3, 36, 36)
    options = dict(
        return_mm_token_type_ids=True, return_text_replacement_offsets=True, padding=True, return_tensors="pt"
    )
    batch = processor(text=["A <image> b", "<image><image>"], images=[make_image(i) for i in range(3)], **options)
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == processor.image_token_id).long())
    assert [[item["span"] for item in row] for row in batch["text_replacement_offsets"]] == [
        [(2, 9)],
        [(0, 7), (7, 14)],
    ]
    assert all(item["replacement"] == "<image>" * 9 for row in batch["text_replacement_offsets"] for item in row)


def test_beams_have_the_images_of_their_row(exported):
    model, processor = load(exported("the paper's")[1])
    texts = ["USER: <image>\n<image>\nWhich? ASSISTANT:", "USER: <image>\nWhat? ASSISTANT:"]
    inputs = processor(text=texts, images=[make_image(i) for i in range(3)], padding=True, return_tensors="pt")
    pixels = inputs["pixel_values"]
    rows, kwargs = model._expand_inputs_for_generation(2, False, inputs["input_ids"], pixel_values=pixels)
    assert torch.equal(rows, inputs["input_ids"].repeat_interleave(2, 0))
    assert torch.equal(kwargs["pixel_values"], torch.cat([pixels[:2], pixels[:2], pixels[2:], pixels[2:]]))
    with torch.no_grad():
        assert len(model.generate(**inputs, max_new_tokens=3, num_beams=2)) == 2


# ---- Files and errors ------------------------------------------------------------------------------------------------


def test_large_weights_are_sharded_with_an_index(exported, tmp_path, monkeypatch):
    folder = exported("the paper's")[0]
    monkeypatch.setattr("stf_jax.weights.export_hf.write_shards", functools.partial(_write_shards, limit=40_000))
    export_hf(folder, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    expected = load_file(exported("the paper's")[1] / "model.safetensors")
    assert {
        name: torch.equal(load_file(tmp_path / "hf" / file)[name], expected[name])
        for name, file in index["weight_map"].items()
    } == dict.fromkeys(expected, True)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    load(tmp_path / "hf")


def _write_shards(folder, tensors, limit):
    from stf_jax.weights.shards import write_shards

    write_shards(folder, tensors, limit)


def test_exports_can_be_cast(exported, tmp_path, capsys):
    assert (
        run_command(
            main, ["export", str(exported("mlp")[0]), "--format=hf", f"--to={tmp_path / 'hf'}", "--dtype=bfloat16"]
        )
        == 0
    )
    assert {value.dtype for value in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    model, _ = load(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    report = json.loads((tmp_path / "hf" / "export.json").read_text())
    assert report["cast"] == {"float32 to bfloat16": report["written"]}
    assert "from float32 to bfloat16" in capsys.readouterr().out


def test_failed_exports_leave_no_files(exported, tmp_path, capsys, monkeypatch):
    def export_error(*args):
        assert run_command(main, ["export", *map(str, args), "--format=hf"]) == 2
        return capsys.readouterr().err

    folder = exported("the paper's")[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not empty" in export_error(folder, f"--to={tmp_path / 'full'}")
    assert "neither the workdir" in export_error(tmp_path, f"--to={tmp_path / 'hf'}")
    half = shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(half / "tokenizer")
    assert "lacks tokenizer" in export_error(half, f"--to={tmp_path / 'hf'}")
    both = tmp_path / "both"
    odd = dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True)
    monkeypatch.setitem(DECODERS, "odd", odd)
    make(both, FusionConfig("mbtf_stf"), "clip", "odd")
    assert "transformers has no class for a language model with qkv_bias=True, qk_norm=True" in export_error(
        both, f"--to={tmp_path / 'hf'}"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "full", "half"]
