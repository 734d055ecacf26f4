"""Exports loaded by transformers in PyTorch, against the models that they were made from."""

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
from make_models import CONTROL, DECODERS, LLAMA, TOWERS, load, make, make_image, turn
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from stf_jax.config import FusionConfig, MeshConfig
from stf_jax.convert import main
from stf_jax.data.conversation import CHATS, encode, template_items
from stf_jax.data.image import to_square
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import MINIATURE, load_tokenizer
from stf_jax.models.vlm import slots_per_image
from stf_jax.runtime.cli import door
from stf_jax.runtime.mesh import computing, make_mesh
from stf_jax.training.state import blueprint
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.imports import import_weights
from stf_jax.weights.model import open_model
from stf_jax.weights.verify import verify

pytestmark = pytest.mark.usefixtures("torch_alone")

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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Case → folder of the model, folder of its export."""

    @functools.cache
    def get(case, **how):
        root = tmp_path_factory.mktemp("case")
        ours = make(root / "ours", *CASES[case], **how)
        export_hf(ours, root / "theirs")
        return ours, root / "theirs"

    return get


@functools.cache
def our_model(folder):
    """Logits of our model, as a compiled call."""
    saved = open_model(folder)
    plan = blueprint(dataclasses.replace(saved.config, precision="float32", remat="none"))
    mesh = make_mesh(MeshConfig(1, 1, 1))
    shardings = plan.shardings(mesh)
    params = {path: jax.device_put(saved.read(path).astype(np.float32), shardings[path]) for path in plan.shapes}

    @jax.jit
    def run(params, tokens, slots, images):
        return plan.merge(params)(tokens, jnp.arange(tokens.shape[1])[None], None, slots, images)

    def call(tokens, slots, images):
        with computing(mesh, "float32"):
            return np.array(run(params, tokens, slots, images))

    return call


def our_logits(folder, ids, is_image, images):
    """Of one row of ids [T]; images are uint8 [M, H, W, 3], two at most."""
    length = -(-len(ids) // 64) * 64  # few lengths, few compilations
    tokens, slots = np.zeros((1, length), np.int32), np.full((1, length), -1, np.int32)
    tokens[0, : len(ids)] = np.where(is_image, 0, ids)
    slots[0, : len(ids)] = np.where(is_image, np.cumsum(is_image) - 1, -1)
    shown = np.zeros((1, 2, 36, 36, 3), np.uint8)
    for i, one in enumerate(images):
        shown[0, i] = one
    return our_model(folder)(tokens, slots, shown)[0, : len(ids)]


def seen(inputs, config):
    """The images of a processor's answer, uint8 [M, H, W, 3]."""
    values = inputs["pixel_values"].permute(0, 2, 3, 1).numpy()
    return np.rint((values * np.array(config.std) + np.array(config.mean)) * 255).astype(np.uint8)


def prompt(processor, *turns, **how):
    return processor.apply_chat_template(
        list(turns), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **how
    )


# ---- The same model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_agree(exported, case):
    folder, theirs = exported(case)
    model, processor = load(theirs)
    assert isinstance(model, LlavaForConditionalGeneration) == case.startswith("mlp")
    images = [make_image(1), make_image(2, (36, 80))]
    inputs = prompt(processor, turn("Which of them is red?", *images))
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
    ids = inputs["input_ids"][0].numpy()
    is_image = ids == processor.image_token_id
    saved = open_model(folder)
    assert is_image.sum() == 2 * slots_per_image(saved.config)
    squares = seen(inputs, saved.description.vision)
    np.testing.assert_allclose(
        logits[:, : saved.description.llm.vocab], our_logits(folder, ids, is_image, squares), atol=1e-4
    )


@pytest.mark.parametrize("case", ["the paper's", "widths", "mlp"])
def test_generations_agree_in_batches_padded_on_the_left(exported, case):
    """Sixteen prompts, with and without images; each new token is our greedy choice after those before it."""
    folder, theirs = exported(case)
    model, processor = load(theirs)
    texts, images = [], []
    for i in range(16):
        shown = [make_image(10 * i + j) for j in range((0, 1, 1, 2)[i % 4])]
        text = "Which " + "very " * (i % 5) + "odd thing is it?"
        texts.append(processor.apply_chat_template([turn(text, *shown)], add_generation_prompt=True, tokenize=False))
        images.append(shown)
    flat = [one for shown in images for one in shown]
    inputs = processor(text=texts, images=flat, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        without = model.generate(**inputs, max_new_tokens=64, do_sample=False, use_cache=False)
    assert torch.equal(said, without)
    vision = open_model(folder).description.vision
    start, squares = inputs["input_ids"].shape[1], iter(seen(inputs, vision))
    for row, mask, shown in zip(said.numpy(), inputs["attention_mask"].numpy(), images, strict=True):
        ids = row[start - mask.sum() :]
        logits = our_logits(folder, ids, ids == processor.image_token_id, [next(squares) for _ in shown])
        logits[:, processor.image_token_id :] = -np.inf  # which the export's generation config keeps from being said
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
def test_a_round_trip_changes_no_bit(tmp_path, case, dtype):
    """Export, import and export again: the same model under the same names."""
    first = make(tmp_path / "ours", *CASES[case], dtype, aspect="pad")
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
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf-again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (tmp_path / "hf-again" / name).read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_halves_and_kernels(exported, dtype, kernel):
    model, processor = load(exported("the paper's")[1], dtype=dtype, attn_implementation=kernel)
    full, _ = load(exported("the paper's")[1], attn_implementation="eager")
    assert {
        module.config._attn_implementation for module in (model.model.language_model, model.model.vision_tower)
    } == {kernel}
    inputs = prompt(processor, turn("What?", make_image(1)))
    with torch.no_grad():
        logits, exact = model(**inputs).logits.float(), full(**inputs).logits
        assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
        assert model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4


def test_it_can_be_trained_there(exported):
    model, processor = load(exported("the paper's")[1])
    model.model.vision_tower.requires_grad_(False)
    inputs = prompt(processor, turn("What?", make_image(1)))
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


def test_both_answer_alike(exported):
    folder, theirs = exported("the paper's")
    pairs = verify(folder, theirs, questions=3, limit=8)
    assert len(pairs) == 3
    assert all(pair.ours and pair.ours == pair.theirs for pair in pairs)


def test_what_is_amiss_when_both_are_asked_is_said(exported, tmp_path, capsys, monkeypatch):
    folder, theirs = exported("mlp")
    monkeypatch.setattr("stf_jax.weights.verify._ours", lambda checkpoint, asked, limit: ["ours"] * len(asked))

    def said(export, *options):
        status = door(main, ["verify", str(folder), str(export), "--tokens=2", "--questions=2", *options])
        printed, complained = capsys.readouterr()
        return status, printed, complained.splitlines()[-1]

    status, printed, complained = said(theirs)
    assert (status, complained) == (2, f"error: {theirs} does not answer as {folder} does.")
    assert len(printed.splitlines()) == 4
    assert printed.endswith("0 of 2 answers are the same.\n")
    assert said(theirs, "--questions=0")[2] == "error: --questions and --tokens must be at least 1."
    assert said(folder)[2] == f"error: {folder} holds no weights: neither *.safetensors, *.bin nor *.gguf."
    torn = shutil.copytree(theirs, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((theirs / "model.safetensors").read_bytes()[:-100])
    assert said(torn)[2].startswith(f"error: {torn}/model.safetensors ")


# ---- Prompts and images --------------------------------------------------------------------------------------------


def our_prompt(folder, tokenizer, template, turns, images):
    slots = slots_per_image(open_model(folder).config)
    return encode(template_items(template, Record("a", images, turns)), tokenizer, slots)


STOPS = {"llama-3": ["<|eot_id|>"], "chatml": ["<|im_end|>"]}


def with_tokenizer(folder, kind, request):
    """Gives the model Llama's tokenizer or its own, with the control tokens of every template; loads it."""
    source = MINIATURE if kind == "miniature" else request.getfixturevalue("llama").name_or_path
    tokenizer = load_tokenizer(str(source))
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    if kind.endswith("not legacy"):
        tokenizer.init_kwargs["legacy"] = False
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    return load_tokenizer(str(folder / "tokenizer"))


@pytest.mark.parametrize(
    ("case", "kind", "template"),
    [
        *itertools.product(("the paper's", "mlp"), ("miniature", "llama"), CHATS),
        # Its later rounds go on without SentencePiece's space.
        ("the paper's", "llama, not legacy", "v1"),
        ("mlp", "llama, not legacy", "v1"),
        ("mlp", "llama, not legacy", "chatml"),
    ],
)
def test_prompts_are_ours_to_the_token(tmp_path, case, kind, template, request):
    folder = make(tmp_path / "ours", *CASES[case], template=template)
    tokenizer = with_tokenizer(folder, kind, request)
    export_hf(folder, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    images = (make_image(1), make_image(2), make_image(3))
    said = (
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
    inputs = prompt(processor, *said)
    ours = our_prompt(folder, tokenizer, template, turns, images)
    is_image = inputs["input_ids"][0].numpy() == processor.image_token_id
    assert is_image.tolist() == ours.is_image.tolist()
    assert inputs["input_ids"][0].numpy()[~is_image].tolist() == ours.tokens[~is_image].tolist()
    assert inputs["attention_mask"].all()
    # The template, rendered and tokenised, says the same: by the processor, and by servers, which add nothing to it.
    rendered = processor.apply_chat_template(list(said), add_generation_prompt=True)
    assert processor(text=[rendered], images=list(images))["input_ids"] == inputs["input_ids"].tolist()
    filled = rendered.replace("<image>", "<image>" * (int(is_image.sum()) // 3))
    assert processor.tokenizer(filled, add_special_tokens=False).input_ids == inputs["input_ids"][0].tolist()
    # A whole conversation, as for training there.
    whole = processor.apply_chat_template(list(said[:4]), tokenize=True, return_dict=True)["input_ids"][0]
    ours = our_prompt(folder, tokenizer, template, turns[:4], images[:2])
    assert [i for i in whole if i != processor.image_token_id] == ours.tokens[~ours.is_image].tolist()
    # An image alone; and where the template writes spaces, the export read back.
    alone = prompt(processor, turn("", make_image(1)))["input_ids"][0]
    turns = (Turn("human", "<image>"),)
    for one in (tokenizer, *([load_tokenizer(str(tmp_path / "hf"))] if kind.endswith("legacy") else [])):
        ours = our_prompt(folder, one, template, turns, images[:1])
        assert alone[alone != processor.image_token_id].tolist() == ours.tokens[~ours.is_image].tolist()
    # Releases before 5 know these by another name.
    values = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert set(CONTROL) <= set(values["additional_special_tokens"])
    assert "extra_special_tokens" not in values
    # What ends an answer there ends it here, and what nothing has trained is not said: <image>, whose id is the next
    # behind the control tokens, and what rows there are beyond it (512 of the miniature's 501 and 5).
    how = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    ends = [*STOPS.get(template, []), "</s>"]
    assert how["eos_token_id"] == tokenizer.convert_tokens_to_ids(ends)
    never = list(range(506, 512)) if kind == "miniature" else [32_005]
    assert how["suppress_tokens"] == never


@pytest.mark.parametrize("template", [*CHATS, "plain"])
def test_a_system_message_is_said_as_in_training(tmp_path, template, request):
    folder = make(tmp_path / "ours", *CASES["the paper's"], template=template)
    with_tokenizer(folder, "miniature", request)
    export_hf(folder, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    asked = (turn("What?"), {"role": "assistant", "content": "A cat."}, turn("Sure?"))
    turns = (Turn("human", "What?"), Turn("gpt", "A cat."), Turn("human", "Sure?"))
    system = {"role": "system", "content": [{"type": "text", "text": ' Say "no".\n'}]}
    if template == "plain":
        with pytest.raises(Exception, match="trained without system messages"):
            processor.apply_chat_template([system, *asked])
        return
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    for text, message in (' Say "no".\n', system), (" ", {"role": "system", "content": " "}):
        inputs = prompt(processor, message, *asked)
        ours = our_prompt(folder, tokenizer, template, (Turn("system", text), *turns), ())
        assert inputs["input_ids"][0].tolist() == ours.tokens.tolist()


def test_a_template_without_its_control_tokens_is_not_exported(tmp_path, capsys):
    folder = make(tmp_path / "ours", *CASES["the paper's"], template="chatml")
    assert door(main, ["export", str(folder), "--format=hf", f"--to={tmp_path / 'hf'}"]) == 2
    assert "'chatml' needs the token <|im_start|>" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_captions_are_asked_for_as_they_were_learned(tmp_path):
    folder = make(tmp_path / "ours", *CASES["the paper's"], template="plain")
    export_hf(folder, tmp_path / "hf")
    _, processor = load(tmp_path / "hf")
    said = (turn("Describe.", make_image(1)), {"role": "assistant", "content": "A cat. "})
    ids = processor.apply_chat_template(list(said), tokenize=True, return_dict=True)["input_ids"][0]
    turns = (Turn("human", "Describe.\n<image>"), Turn("gpt", "A cat. "))
    tokenizer = load_tokenizer("miniature")
    ours = our_prompt(folder, tokenizer, "plain", turns, (make_image(1),))
    how = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert how["eos_token_id"] == [ours.tokens[-1], tokenizer.eos_token_id]  # the newline that was learned
    assert [i for i in ids if i != processor.image_token_id] == ours.tokens[~ours.is_image].tolist()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_images_are_ours(tmp_path, tower, aspect):
    folder = make(tmp_path / "ours", FusionConfig("mbtf_stf"), tower, "llama", aspect=aspect)
    export_hf(folder, tmp_path / "hf")
    _, processor = load(tmp_path / "hf")
    config = TOWERS[tower]
    for size in ((36, 36), (50, 41), (41, 50), (20, 97), (200, 30)):
        one = make_image(3, size)
        inputs = prompt(processor, turn("What?", one))
        values = inputs["pixel_values"][0].permute(1, 2, 0).numpy()
        ours = to_square(one, config, aspect)
        off = np.abs(seen(inputs, config)[0].astype(int) - ours)
        assert off.max() <= 1  # roundings, in few places
        assert (off > 0).mean() < 0.02
        np.testing.assert_allclose(
            values, (seen(inputs, config)[0] / 255 - np.array(config.mean)) / np.array(config.std), atol=1e-6
        )


def test_images_and_places_must_match(exported):
    model, processor = load(exported("the paper's")[1])
    with pytest.raises(ValueError, match="1 <image>, but there are 2 images"):
        processor(text="<image> What?", images=[make_image(1), make_image(2)])
    with pytest.raises(ValueError, match="1 <image>, but there are 0 images"):
        processor(text="<image> What?")
    inputs = processor(text="<image> What?", images=make_image(1), return_tensors="pt")
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="places for"):
        model(input_ids=inputs["input_ids"][:, 3:], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="not truncated"):
        processor(text="What?", truncation=True, max_length=4)


def test_servers_learn_where_the_images_are(exported):
    _, processor = load(exported("the paper's")[1])
    assert processor._get_num_multimodal_tokens([(10, 10), (5, 7)])["num_image_tokens"] == [9, 9]
    assert processor(images=[make_image(1), make_image(2)], return_tensors="pt")["pixel_values"].shape == (2, 3, 36, 36)
    asked = dict(return_mm_token_type_ids=True, return_text_replacement_offsets=True, padding=True, return_tensors="pt")
    batch = processor(text=["A <image> b", "<image><image>"], images=[make_image(i) for i in range(3)], **asked)
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == processor.image_token_id).long())
    assert [[one["span"] for one in row] for row in batch["text_replacement_offsets"]] == [[(2, 9)], [(0, 7), (7, 14)]]
    assert all(one["replacement"] == "<image>" * 9 for row in batch["text_replacement_offsets"] for one in row)


def test_beams_see_the_images_of_their_own_row(exported):
    model, processor = load(exported("the paper's")[1])
    texts = ["USER: <image>\n<image>\nWhich? ASSISTANT:", "USER: <image>\nWhat? ASSISTANT:"]
    both = processor(text=texts, images=[make_image(i) for i in range(3)], padding=True, return_tensors="pt")
    own = both["pixel_values"]
    rows, more = model._expand_inputs_for_generation(2, False, both["input_ids"], pixel_values=own)
    assert torch.equal(rows, both["input_ids"].repeat_interleave(2, 0))
    assert torch.equal(more["pixel_values"], torch.cat([own[:2], own[:2], own[2:], own[2:]]))
    with torch.no_grad():
        assert len(model.generate(**both, max_new_tokens=3, num_beams=2)) == 2


# ---- What is written -------------------------------------------------------------------------------------------------


def test_weights_are_sharded_with_an_index(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("stf_jax.weights.export_hf.write_shards", functools.partial(_write_shards, limit=40_000))
    export_hf(exported("the paper's")[0], tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    whole = load_file(exported("the paper's")[1] / "model.safetensors")
    assert {
        name: torch.equal(load_file(tmp_path / "hf" / file)[name], whole[name])
        for name, file in index["weight_map"].items()
    } == dict.fromkeys(whole, True)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    load(tmp_path / "hf")


def _write_shards(folder, tensors, limit):
    from stf_jax.weights.shards import write_shards

    write_shards(folder, tensors, limit)


def test_a_type_may_be_asked_for(exported, tmp_path, capsys):
    assert (
        door(main, ["export", str(exported("mlp")[0]), "--format=hf", f"--to={tmp_path / 'hf'}", "--dtype=bfloat16"])
        == 0
    )
    assert {value.dtype for value in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    model, _ = load(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    report = json.loads((tmp_path / "hf" / "export.json").read_text())
    assert report["cast"] == {"float32 to bfloat16": report["written"]}
    assert "from float32 to bfloat16" in capsys.readouterr().out


def test_what_cannot_be_exported_is_said_and_nothing_is_left(exported, tmp_path, capsys, monkeypatch):
    def refused(*args):
        assert door(main, ["export", *map(str, args), "--format=hf"]) == 2
        return capsys.readouterr().err

    folder = exported("the paper's")[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not empty" in refused(folder, f"--to={tmp_path / 'full'}")
    assert "neither the workdir" in refused(tmp_path, f"--to={tmp_path / 'hf'}")
    half = shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(half / "tokenizer")
    assert "lacks tokenizer" in refused(half, f"--to={tmp_path / 'hf'}")
    both = tmp_path / "both"
    odd = dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True)
    monkeypatch.setitem(DECODERS, "odd", odd)
    make(both, FusionConfig("mbtf_stf"), "clip", "odd")
    assert "both query biases and query norms" in refused(both, f"--to={tmp_path / 'hf'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "full", "half"]
