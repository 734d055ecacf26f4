"""One load of questions with images, posted to exports under vLLM's OpenAI server in turn."""

import argparse
import base64
import concurrent.futures
import dataclasses
import io
import json
import pathlib
import tempfile
import time
import urllib.request
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from benchmarks.synthetic import make_export
from benchmarks.vllm_server import serve
from stf_jax.config import FusionConfig, ModelConfig, UserError
from stf_jax.files import read_json

_PYTHON = pathlib.Path(__file__).parent.parent / ".venv-serve" / "bin" / "python"
_FUSIONS = ("mlp", "mbtf_stf")  # of the exports that are made here
_SIDE = 384  # pixels of the images
_TEXT = "Describe what is shown, then say which of its parts is the largest."
_MAX_LENGTH = 1024  # tokens per conversation


@dataclasses.dataclass(frozen=True)
class _Answer:
    """The times of a request in seconds, and its tokens."""

    first_token: float
    end: float
    prompt_tokens: int
    new_tokens: int


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Serves one export after another, and posts the same requests; one row for each number in flight."""
    try:
        levels = [int(level) for level in options.in_flight.split(",")]
    except ValueError:
        raise UserError(f"--in-flight={options.in_flight} must be comma-separated integers.") from None
    if min(levels) < 1 or options.tokens < 1 or options.requests < 1:
        raise UserError("--in-flight, --requests and --tokens must be at least 1.")
    for export in options.exports:
        if not (export / "config.json").exists():
            raise UserError(f"{export} is not an export: it has no config.json.")
    if not _PYTHON.exists():
        raise UserError(f"{_PYTHON} does not exist: run `make .venv-serve/ready` first.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        exports = options.exports or [_make(options, pathlib.Path(scratch), fusion) for fusion in _FUSIONS]
        for export in exports:
            rows += _measure(export, levels, options)
    for row in rows:
        first = next(other for other in rows if other["in_flight"] == row["in_flight"])
        row["times_first"] = row["requests_per_second"] / first["requests_per_second"]
    return rows


def _make(options: argparse.Namespace, scratch: pathlib.Path, fusion: str) -> pathlib.Path:
    config = ModelConfig(options.vision, options.llm, FusionConfig(fusion), options.precision, remat="none")
    make_export(config, scratch / f"{fusion}-made", scratch / fusion)
    return scratch / fusion


def _measure(export: pathlib.Path, levels: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    # Each request is computed: nothing is taken from a cache of prompts or of images.
    uncached = ["--no-enable-prefix-caching", "--mm-processor-cache-gb=0"]
    with serve(str(_PYTHON), str(export), options.precision, _MAX_LENGTH, 1, uncached) as port:
        _post(port, export, options.tokens, 0)  # a warm-up
        for level in levels:
            begin = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(level) as pool:
                numbers = range(1, 1 + max(level, options.requests))
                answers = list(pool.map(lambda number: _post(port, export, options.tokens, number), numbers))
            seconds = time.perf_counter() - begin
            waits = [1e3 * answer.first_token for answer in answers]
            length = answers[0].prompt_tokens + answers[0].new_tokens
            rows.append(
                {
                    "what": export.name,
                    "in_flight": level,
                    "prompt_tokens": answers[0].prompt_tokens,
                    "requests_per_second": len(answers) / seconds,
                    "first_token_ms_p50": float(np.percentile(waits, 50)),
                    "first_token_ms_p99": float(np.percentile(waits, 99)),
                    "kv_cache_mib": length * _cache_bytes_per_token(export, options.precision) / 2**20,
                }
            )
    return rows


def _post(port: int, export: pathlib.Path, tokens: int, number: int) -> _Answer:
    """Asks about an image of its own, and reads the answer as it is generated."""
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_make_image(number)}"}},
        {"type": "text", "text": _TEXT},
    ]
    body = {
        "model": str(export),
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,  # so that all answers have the same length
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    usage: dict[str, int] = {}
    begin, first = time.perf_counter(), 0.0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begin
                usage = json.loads(line[len(b"data: ") :]).get("usage") or usage
    return _Answer(first, time.perf_counter() - begin, usage["prompt_tokens"], usage["completion_tokens"])


def _make_image(number: int) -> str:
    """Returns a PNG of colored squares, in base64."""
    colors = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    image = PIL.Image.fromarray(colors).resize((_SIDE, _SIDE), PIL.Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _cache_bytes_per_token(export: pathlib.Path, precision: str) -> int:
    """Returns the bytes of keys and values of a token in all layers."""
    config = read_json(epath.Path(export / "config.json"))["text_config"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return 2 * config["num_hidden_layers"] * heads * head * (4 if precision == "float32" else 2)
