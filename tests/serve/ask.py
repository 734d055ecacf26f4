"""Runs exports as users do, in the serving environment: ``ask.py METHOD FOLDER …``.

Each FOLDER holds ``export/`` and ``questions.json``: ``questions``, each with its ``text`` and ``images`` (PNG files),
and ``limit``, the maximum number of new tokens. The token ids of the answers are written to ``METHOD.json`` there, one
list per question.
"""

import base64
import json
import os
import pathlib
import sys
import urllib.request

import PIL.Image

from benchmarks.vllm_server import serve  # of the clone, by PYTHONPATH

MAX_LENGTH = 512  # tokens per conversation
MAX_IMAGES = 2  # per question


def main(method: str, folders: list[str]) -> None:
    """Runs a method: ``generate``, ``pipeline``, ``chat`` (vLLM's offline) or ``serve`` (vLLM's OpenAI API)."""
    for folder in map(pathlib.Path, folders):
        questions = json.loads((folder / "questions.json").read_bytes())
        answers = _METHODS[method](str(folder / "export"), questions["questions"], questions["limit"])
        (folder / f"{method}.json").write_text(json.dumps(answers))


def _generate(export, questions, limit):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    answers = []
    for question in questions:
        inputs = processor.apply_chat_template(
            _turns(question, _image_part("image")),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def _pipeline(export, questions, limit):
    import torch
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=export, trust_remote_code=True, dtype=torch.float32)
    settings = {"max_new_tokens": limit, "do_sample": False}
    answers = []
    for question in questions:
        turns = _turns(question, _image_part("image"))
        output = pipe(text=turns, generate_kwargs=settings, return_tensors=True)[0]
        prompt = pipe.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        answers.append(output["generated_token_ids"][prompt["input_ids"].shape[1] :].tolist())
    return answers


def _chat(export, questions, limit):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # runs the engine in this process: one start for all exports
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        export,
        trust_remote_code=True,
        model_impl="transformers",  # vLLM's own LLaVA needs torchvision, which is not installed
        dtype="float32",
        max_model_len=MAX_LENGTH,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
        limit_mm_per_prompt={"image": MAX_IMAGES},
    )
    turns = [_turns(question, _image_part("image_pil")) for question in questions]
    outputs = engine.chat(turns, SamplingParams(temperature=0, max_tokens=limit), use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    del engine
    cleanup_dist_env_and_memory()
    return answers


def _serve(export, questions, limit):
    with serve(sys.executable, export, "float32", MAX_LENGTH, MAX_IMAGES) as port:
        return [_post(port, export, question, limit) for question in questions]


def _post(port, export, question, limit):
    turns = _turns(question, _url_part)
    body = {"model": export, "messages": turns, "temperature": 0, "max_tokens": limit, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["token_ids"]


def _turns(question, make_part):
    content = [make_part(file) for file in question["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question["text"]}]}]


def _image_part(kind):
    return lambda file: {"type": kind, kind: PIL.Image.open(file).convert("RGB")}


def _url_part(file):
    data = base64.b64encode(pathlib.Path(file).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


_METHODS = {"generate": _generate, "pipeline": _pipeline, "chat": _chat, "serve": _serve}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
