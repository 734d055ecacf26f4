"""Exports in transformers and vLLM, in .venv-serve, give the same answers as in JAX: `make test-serve`.

Tested are the export of the demo (``DEMO``, its workdir), and small models of random weights for each template, with
both kinds of exports and tokenizers, and for images in tiles. Decoding is greedy, in float32.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess

import pytest
from make_models import CONTROL, DECODERS, make, make_image

from stf_jax.config import FusionConfig, MeshConfig
from stf_jax.data.records import Record, Turn
from stf_jax.data.tiles import Tiles
from stf_jax.data.tokenizer import MINIATURE, load_tokenizer
from stf_jax.evals.benchmark import SHORT_ANSWER_SUFFIX
from stf_jax.evals.benchmarks.scenes import held_out_questions
from stf_jax.inference.loading import load_generator
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.parallel.mesh import make_mesh
from stf_jax.weights.export_hf import export_hf

ROOT = pathlib.Path(__file__).parent.parent.parent
QUESTIONS = 48
METHODS = ("generate", "pipeline", "chat", "serve")
# Heads of 32, the smallest that vLLM supports on CPUs. Vocabularies as large as their tokenizers, without <image>.
DECODER = LLMConfig(506, width=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=96, norm_eps=1e-4)
DECODERS["served"], DECODERS["served, llama"] = DECODER, dataclasses.replace(DECODER, vocab=32_005)
CASES = {  # template, fusion, tower, decoder
    "v1": ("v1", "mlp", "clip", "served, llama"),
    "plain": ("plain", "mbtf_stf", "clip", "served"),
    "llama-3": ("llama-3", "mbtf_stf", "siglip", "served"),
    "chatml": ("chatml", "mlp", "clip", "served"),
    "mistral": ("mistral", "mbtf_stf", "clip", "served, llama"),
    "tiles": ("v1", "mbtf_stf", "clip", "served, llama"),
    "tiles without newlines": ("chatml", "mbtf_stf", "clip", "served"),
    "tiles, mlp": ("v1", "mlp", "clip", "served, llama"),
}
MARKS = {"tiles": "newline", "tiles without newlines": "none", "tiles, mlp": "newline"}
GRIDS = ((1, 2), (2, 1), (2, 2))
SIZES = ((50, 41), (90, 33), (20, 61))  # heights and widths of images, with another grid of tiles each


@pytest.fixture(scope="module")
def served(tmp_path_factory, sentencepiece_model):
    """Returns the folder with the answers of all cases, and our answers by case."""
    root, expected = tmp_path_factory.mktemp("served"), {}
    demo = pathlib.Path(os.environ.get("DEMO", "runs/demo"))
    for case in (*CASES, "demo"):
        folder = root / case
        folder.mkdir()
        if case == "demo":
            shutil.copytree(demo / "export", folder / "export")
            model, limit = demo / "finetune", 16
        else:
            model, limit = _make_model(folder / "model", case, sentencepiece_model), 8
            export_hf(model, folder / "export")
        expected[case] = _answer_in_jax(model, folder, case, limit)
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": str(ROOT)}
    python = ROOT / ".venv-serve" / "bin" / "python"
    for method in METHODS:
        command = [python, pathlib.Path(__file__).with_name("ask.py"), method, *(root / case for case in expected)]
        subprocess.run(command, env=os.environ | environment, check=True, cwd=root)
    return root, expected


def _make_model(folder, case, sentencepiece_model):
    template, fusion, tower, decoder = CASES[case]
    tiles = {"aspect": "tiles", "tiles": Tiles(GRIDS, MARKS[case])} if case in MARKS else {}
    make(folder, FusionConfig(fusion), tower, decoder, template=template, **tiles)
    source = MINIATURE
    if decoder == "served, llama":
        source = folder.with_name("sentencepiece")
        source.mkdir()
        shutil.copy(sentencepiece_model, source / "tokenizer.model")
    tokenizer = load_tokenizer(str(source))
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def _answer_in_jax(model, folder, case, limit):
    """Returns our answers and writes the questions. For small models, a third has no image and a third has two."""
    questions, records = [], []
    scenes = held_out_questions() if case == "demo" else [None] * QUESTIONS
    for i, scene in enumerate(scenes[:QUESTIONS]):
        noise = [make_image(100 * i + j, SIZES[(i + j) % 3]) for j in range((1, 0, 2)[i % 3])]
        images = [scene.image()] if scene else noise
        text = (
            scene.question.text + SHORT_ANSWER_SUFFIX if scene else f"Which {'very ' * (i % 7)}odd thing is number {i}?"
        )
        files = [folder / f"{i}-{j}.png" for j in range(len(images))]
        for image, file in zip(images, files, strict=True):
            image.save(file)
        questions.append({"text": text, "images": [str(file) for file in files]})
        openers = tuple(lambda image=image: image for image in images)
        records.append(Record(str(i), openers, (Turn("human", "<image>\n" * len(images) + text),)))
    (folder / "questions.json").write_text(json.dumps({"questions": questions, "limit": limit}))
    generator, _ = load_generator(model, make_mesh(MeshConfig(1, 1, 1)), "float32")
    return list(generator.generate(records, limit, 16))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [*CASES, "demo"])
def test_served_answers_match(served, case, method, record_property):
    root, expected = served
    tokenizer = load_tokenizer(str(root / case / "export"))
    answers = json.loads((root / case / f"{method}.json").read_bytes())
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    same = sum(text == answer for text, answer in zip(texts, expected[case], strict=True))
    record_property(f"{case}, {method}", f"{same} of {len(expected[case])}")
    assert len(set(expected[case])) > 1
    assert texts == expected[case]
