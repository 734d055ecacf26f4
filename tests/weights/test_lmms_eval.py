"""Exports evaluated by the full lmms-eval with the package in the export, and by VLMEvalKit's class on a stub."""

import ast
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from etils import epath
from transformers import AutoModelForImageTextToText, AutoProcessor

from stf_jax.checkpointing.params import write_params
from stf_jax.config import FusionConfig, ModelConfig
from stf_jax.data.conversation import encode, template_items
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import MINIATURE, load_tokenizer
from stf_jax.models.blueprint import blueprint
from stf_jax.models.decoders.base import LLMConfig
from stf_jax.models.spec import VISION
from stf_jax.weights.export_hf import export_hf
from stf_jax.weights.model import Description

pytestmark = pytest.mark.usefixtures("torch_setup")

TOWER = dataclasses.replace(VISION["clip-mini-16-96"], image_size=36, patch_size=6, width=32, layers=4, heads=2, mlp=48)
DECODER = LLMConfig(512, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, norm_eps=1e-4)
SLOTS = {"mbtf_stf": 9, "mlp": 36}  # image tokens: 36 patches, or windows of four
WORDS = ["red", "a blue thing", "No", "three"]
TASK = """
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: best
"""
TASKS = {
    "generate": """
output_type: generate_until
generation_kwargs: {max_new_tokens: 12, temperature: 0, top_p: 1.0, do_sample: false, image_aspect_ratio: pad}
process_results: !function utils.pairs
metric_list: [{metric: pairs, aggregation: !function utils.collect, higher_is_better: true}]
""",
    "rounds": """
output_type: generate_until_multi_round
generation_kwargs: {max_new_tokens: 6}
process_results: !function utils.pairs
metric_list: [{metric: pairs, aggregation: !function utils.collect, higher_is_better: true}]
""",
    "choose": """
output_type: multiple_choice
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}
UTILS = """
def images(doc):
    return doc["images"]

def question(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    rounds = (previous_round_info or 0) + 1
    assert round_idx == rounds == len(previous_output)
    return doc["images"][:1], f"{previous_output[-1]} Sure?", rounds == doc["best"] + 1, previous_output, rounds

def pairs(doc, results):
    return {"pairs": (doc["question"], results[0])}

def collect(items):
    return dict(items)
"""


@pytest.fixture(scope="module", autouse=True)
def _restore_truncated_image_errors():
    """lmms-eval makes Pillow accept truncated images in the whole process; this undoes it."""
    yield
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Returns the export of a model of random weights, by fusion."""

    def make(fusion):
        root = tmp_path_factory.mktemp(fusion)
        folder, fusion = epath.Path(root / "model"), FusionConfig(fusion)
        folder.mkdir()
        Description(TOWER, DECODER, fusion).save(folder)
        shutil.copytree(MINIATURE, folder / "tokenizer")
        plan, rng = blueprint(ModelConfig(str(folder), str(folder), fusion)), np.random.default_rng(0)

        def value(path, leaf):
            fan_in = 32 if "/attention/" in path else leaf.shape[-2] if path.endswith("kernel") else 1
            x = rng.normal(size=leaf.shape) * (1.2 * fan_in**-0.5 if path.endswith("kernel") else 0.3)
            return (x + path.endswith("scale")).astype(np.float32)

        write_params(folder, ((path, value(path, leaf)) for path, leaf in plan.shapes.items()))
        export_hf(folder, root / "export")
        return root / "export"

    return {fusion: make(fusion) for fusion in SLOTS}


@pytest.fixture(scope="module")
def plugin(exports, tmp_path_factory):
    """Returns the model class of an export's package, installed where lmms-eval finds it."""
    assert importlib.util.find_spec("lmms_eval"), "pip install --no-deps --requirement requirements-data.txt"
    site, source = tmp_path_factory.mktemp("site"), exports["mbtf_stf"] / "lmms_eval_stf"
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, f"--target={site}", source], check=True)
    for name in [name for name in sys.modules if name.startswith("lmms_eval")]:
        del sys.modules[name]  # it looks for plugins when it is imported
    sys.path.insert(0, str(site))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield importlib.import_module("lmms_eval.models").get_model("llava_stf")
    sys.path.remove(str(site))
    del os.environ["HF_HOME"]


@pytest.fixture
def rows():
    """Questions of different lengths with zero to two images."""
    return [
        {
            "images": [make_image(10 * i + j) for j in range((1, 0, 2, 1)[i % 4])],
            "question": "Which " + "very " * (i % 5) + f"odd thing is {i}?",
            "choices": WORDS,
            "best": i % 3,
        }
        for i in range(7)
    ]


def make_image(seed):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 41, 3), np.uint8))


@pytest.fixture(scope="module", params=SLOTS)
def loaded(request, exports, plugin):
    """An export loaded by lmms-eval, with batches of three, and by transformers."""
    folder = exports[request.param]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return Loaded(request.param, folder, plugin(str(folder), device="cpu", batch_size="3"), model, processor)


class Loaded(NamedTuple):
    fusion: str
    folder: pathlib.Path
    lm: Any
    model: Any
    processor: Any

    @torch.inference_mode()
    def answer(self, question, images, **kwargs):
        """Returns transformers' answer to a single question."""
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        output = self.model.generate(**inputs, **{"do_sample": False} | kwargs)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    @torch.inference_mode()
    def likelihood(self, question, images, answer):
        """Returns the log-probability of an answer over its target tokens in training, and whether it is greedy."""
        turns = (Turn("human", "<image>" * len(images) + question), Turn("gpt", answer))
        items = template_items("v1", Record("", tuple(lambda image=image: image for image in images), turns))
        encoded = encode(items, load_tokenizer("miniature"), SLOTS[self.fusion])
        ids = torch.tensor(np.where(encoded.is_image, self.processor.image_token_id, encoded.tokens)[None]).long()
        pixels = self.processor.image_processor(images, return_tensors="pt") if images else {}
        logits = self.model(input_ids=ids, **pixels).logits[0].double()
        logits[:, self.model.generation_config.suppress_tokens or []] = -torch.inf
        positions = np.flatnonzero(encoded.is_target)[:-1]  # the last ends the turn
        value = sum(logits[i - 1].log_softmax(-1)[ids[0, i]].item() for i in positions)
        return value, all(logits[i - 1].argmax() == ids[0, i] for i in positions)

    def requests(self, rows, kind, *arguments):
        """Makes lmms-eval's requests for a task's rows; ``arguments`` go between context and document."""
        from lmms_eval.api.instance import Instance

        self.lm.task_dict = {"task": {"test": rows}}
        meta = {"task": "task", "repeats": 1}
        return [
            Instance(kind, (row["question"], *arguments, i, "task", "test"), 0, {"doc_id": i} | meta)
            for i, row in enumerate(rows)
        ]


def get_images(row):
    return row["images"]


# ---- Full evaluations ------------------------------------------------------------------------------------------------


def test_tasks_are_evaluated(loaded, rows, tmp_path):
    """Results of three kinds of tasks equal those computed from transformers' single answers."""
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    strings = datasets.Sequence(datasets.Value("string"))
    features = {"images": datasets.Sequence(datasets.Image()), "question": datasets.Value("string")}
    features = datasets.Features(features | {"choices": strings, "best": datasets.Value("int64")})
    split = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"test": split}).save_to_disk(tmp_path / "data")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    for name, values in TASKS.items():
        text = f"task: {name}" + TASK.format(data=tmp_path / "data") + values
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    found = simple_evaluate(
        model="llava_stf", model_args=f"pretrained={loaded.folder},dtype=float32", batch_size="3", device="cpu",
        tasks=list(TASKS), bootstrap_iters=0, log_samples=False,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False, model_name="llava_stf"),
    )["results"]  # fmt: skip

    def rounds(row):
        answers = [loaded.answer(row["question"], row["images"], max_new_tokens=6)]
        for _ in range(row["best"]):
            answers.append(loaded.answer(f"{answers[-1]} Sure?", row["images"][:1], max_new_tokens=6))
        return answers

    answers = {row["question"]: loaded.answer(row["question"], row["images"], max_new_tokens=12) for row in rows}
    assert len(set(answers.values())) == len(rows)
    assert found["generate"]["pairs,none"] == answers
    assert found["rounds"]["pairs,none"] == {row["question"]: rounds(row) for row in rows}
    best = [np.argmax([loaded.likelihood(row["question"], row["images"], word)[0] for word in WORDS]) for row in rows]
    correct = [int(chosen) == row["best"] for chosen, row in zip(best, rows, strict=True)]
    assert 0 < sum(correct) < len(rows)
    assert found["choose"]["acc,none"] == pytest.approx(sum(correct) / len(rows))


# ---- Kinds of requests -----------------------------------------------------------------------------------------------


def test_likelihoods_are_exact(loaded, rows):
    greedy = [loaded.answer(row["question"], row["images"], max_new_tokens=2) for row in rows]
    flags = []
    for words in (*([word] * len(rows) for word in WORDS), greedy):
        for row, word in zip(rows, words, strict=True):
            row["answer"] = word
        exact = [loaded.likelihood(row["question"], row["images"], row["answer"]) for row in rows]
        flags += [flag for _, flag in exact]
        found = loaded.lm.loglikelihood(loaded.requests(rows, "loglikelihood", lambda row: row["answer"], get_images))
        assert [flag for _, flag in found] == [flag for _, flag in exact]
        np.testing.assert_allclose([value for value, _ in found], [value for value, _ in exact], atol=1e-4)
        assert max(value for value, _ in exact) < -0.1
    assert 0 < sum(flags) < len(flags)
    # lmms-eval compares given answers by the negated log-probability.
    (found,) = loaded.lm.loglikelihood(loaded.requests(rows[:1], "loglikelihood", " red", get_images))
    assert found == (pytest.approx(-loaded.likelihood(rows[0]["question"], rows[0]["images"], "red")[0]), False)
    (found,) = loaded.lm.loglikelihood(loaded.requests(rows[:1], "loglikelihood", " ", get_images))
    assert found == (0, True)


def test_settings_are_passed_to_generate(loaded, rows):
    def found(**settings):
        return loaded.lm.generate_until(loaded.requests(rows[:1], "generate_until", settings, get_images))[0]

    def direct(**settings):
        return loaded.answer(rows[0]["question"], rows[0]["images"], **settings)

    greedy = direct(max_new_tokens=10)
    assert found(max_new_tokens=10) == greedy
    assert found(max_new_tokens=10, do_sample=True, temperature=0, top_p=None) == greedy
    assert found(max_new_tokens=10, do_sample=False, temperature=1.5, seed=3) == greedy
    beams = direct(max_new_tokens=10, num_beams=4)
    assert found(max_new_tokens=10, num_beams=4) == beams != greedy
    for settings, expected in (
        ({"temperature": 1.5}, {"temperature": 1.5}),
        ({"temperature": 1.5, "top_p": 0.4}, {"temperature": 1.5, "top_p": 0.4}),
        ({"do_sample": True}, {"temperature": 1.0}),
    ):
        torch.manual_seed(1)
        sampled = direct(max_new_tokens=10, do_sample=True, **expected)
        torch.manual_seed(1)
        assert found(max_new_tokens=10, **settings) == sampled != greedy
    first, second = greedy[3:5], greedy[5:7]
    assert found(max_new_tokens=10, until=second) == greedy.split(second)[0].strip() != greedy
    assert found(max_new_tokens=10, until=[second, "never", first]) == greedy.split(first)[0].split(second)[0].strip()
    assert found(max_new_tokens=10, until=[""]) == greedy


def test_requests_with_different_settings_keep_their_order(loaded, rows):
    requests = loaded.requests(rows, "generate_until", {}, get_images)
    for i, request in enumerate(requests):
        request.arguments = (request.args[0], {"max_new_tokens": 3 + i % 3}, *request.args[2:])
    expected = [loaded.answer(row["question"], row["images"], max_new_tokens=3 + i % 3) for i, row in enumerate(rows)]
    assert loaded.lm.generate_until(requests) == expected


def test_image_marks_in_a_question_move_to_its_front(loaded, rows):
    marked = [rows[2] | {"question": "First <image> then <image>, which?"}]
    (found,) = loaded.lm.generate_until(loaded.requests(marked, "generate_until", {"max_new_tokens": 8}, get_images))
    assert found == loaded.answer("First  then , which?", rows[2]["images"], max_new_tokens=8)


def test_unsupported_inputs_are_refused(loaded, rows, plugin, tmp_path):
    for visuals, kind in ((["film.mp4"], "str"), ([{"array": 0}], "dict")):
        with pytest.raises(ValueError, match=f"Task task has an input of type {kind}; llava_stf supports only images"):
            loaded.lm.generate_until(loaded.requests(rows[:1], "generate_until", {}, lambda row, v=visuals: v))
    with pytest.raises(ValueError, match="is not a folder of an export"):
        plugin(str(tmp_path))
    with pytest.raises(ValueError, match="batch_size=auto must be a positive integer"):
        plugin(str(loaded.folder), batch_size="auto")


# ---- Packages in the export ------------------------------------------------------------------------------------------


def test_packages_in_exports_do_not_import_stf_jax(exports):
    allowed = {"torch", "transformers", "lmms_eval", "accelerate", "PIL", "tqdm"}
    for folder in exports.values():
        bundled = folder / "lmms_eval_stf"
        assert {"lmms_eval_stf.py", "pyproject.toml"} <= {path.name for path in bundled.iterdir()}
        for file in (bundled / "lmms_eval_stf.py", folder / "vlmevalkit_stf.py"):
            nodes = list(ast.walk(ast.parse(file.read_text())))
            names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
            assert {name.split(".")[0] for name in names} - allowed <= sys.stdlib_module_names


@pytest.fixture
def vlmevalkit(exports, monkeypatch):
    """VLMEvalKit's class with stubs of its two imports."""
    kinds = {"POPE": "Y/N", "MME": "Y/N", "GQA_TestDev_Balanced": "VQA", "VizWiz": "VQA"}

    class BaseModel:
        def __init__(self):
            self.dump_image_func = None

        def dump_image(self, line, dataset):
            return self.dump_image_func(line)

    for name, values in {
        "vlmeval": {"__path__": []},
        "vlmeval.dataset": {"DATASET_TYPE": lambda dataset: kinds.get(dataset, "MCQ")},
        "vlmeval.vlm": {"__path__": []},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    file = exports["mbtf_stf"] / "vlmevalkit_stf.py"
    spec = importlib.util.spec_from_file_location("vlmeval.vlm.vlmevalkit_stf", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LlavaSTF


def test_vlmevalkit_gives_transformers_answers(loaded, rows, vlmevalkit, tmp_path):
    model = vlmevalkit(str(loaded.folder), max_new_tokens=8)
    model.model.to("cpu")
    for row in rows:
        message = [{"type": "text", "value": row["question"]}]
        for i, image in enumerate(row["images"]):
            image.save(tmp_path / f"{i}.png")
            message.insert(0 if i else 1, {"type": "image", "value": str(tmp_path / f"{i}.png")})
        images = row["images"][::-1]  # the second image comes first in the message
        expected = loaded.answer(row["question"], images, max_new_tokens=8)
        assert model.generate_inner(message) == expected


def test_vlmevalkit_builds_llavas_prompts(vlmevalkit):
    model = vlmevalkit.__new__(vlmevalkit)
    model.dump_image_func = lambda line: ["a.png", "b.png"]

    def make_prompt(dataset, **line):
        assert model.use_custom_prompt(dataset)
        *images, text = model.build_prompt(line, dataset)
        assert images == [{"type": "image", "value": "a.png"}, {"type": "image", "value": "b.png"}]
        return text["value"]

    letter = "Answer with the option's letter from the given choices directly."
    short = "Answer the question using a single word or phrase."
    nothing = float("nan")
    two = dict(A="one", B="two", C=nothing, D=nothing)
    assert (
        make_prompt("MMBench_DEV_EN", question="Which?", hint="So.", **two) == f"So.\nWhich?\nA. one\nB. two\n{letter}"
    )
    assert make_prompt("MMBench_DEV_EN", question="Which?", hint=nothing, **two) == f"Which?\nA. one\nB. two\n{letter}"
    assert make_prompt("MMBench_DEV_CN", question="Which?", **two) == "Which?\nA. one\nB. two\n请直接回答选项字母。"
    assert make_prompt("ScienceQA_TEST", question="Which?", hint="So.", **two).startswith(
        "Context: So.\nWhich?\nA. one"
    )
    assert make_prompt("POPE", question="Is it?") == f"Is it?\n{short}"
    assert make_prompt("MME", question="Is it? Please answer yes or no.") == f"Is it?\n{short}"
    unanswerable = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert make_prompt("VizWiz", question="What?") == f"What?\n{unanswerable}\n{short}"
    assert not model.use_custom_prompt("GQA_TestDev_Balanced")
