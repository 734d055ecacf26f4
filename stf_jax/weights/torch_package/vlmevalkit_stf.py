"""Evaluates STF-JAX exports with VLMEvalKit: copy this file into its ``vlmeval/vlm/``.

Prompts are built as in training: with the export's chat template, and the images of a question before its text.
"""

import string

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..dataset import DATASET_TYPE
from .base import BaseModel

_SHORT = "\nAnswer the question using a single word or phrase."
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_LETTER = {False: "\nAnswer with the option's letter from the given choices directly.", True: "\n请直接回答选项字母。"}


class LlavaSTF(BaseModel):
    """An STF-JAX export with any fusion.

    Args:
      model_path: folder of the export. Its code is run.
      settings: options of ``generate``; the defaults are greedy decoding and at most 1024 new tokens.
    """

    INTERLEAVE = True

    def __init__(self, model_path: str, **settings):
        super().__init__()
        self.processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            model_path, dtype="auto", trust_remote_code=True, local_files_only=True
        )
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.settings = {"do_sample": False, "max_new_tokens": 1024} | settings

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether LLaVA's prompt differs from VLMEvalKit's. For open questions, only that of VizWiz does."""
        return DATASET_TYPE(dataset) in ("MCQ", "Y/N") or dataset == "VizWiz"

    def build_prompt(self, line, dataset: str) -> list[dict]:
        """Builds LLaVA's prompt for a row of a dataset."""
        fields = {key: line[key] for key in ("hint", *string.ascii_uppercase) if key in line and line[key] == line[key]}
        context = "Context: " if dataset.startswith("ScienceQA") else ""
        hint = f"{context}{fields.pop('hint')}\n" if "hint" in fields else ""
        options = "".join(f"\n{letter}. {option}" for letter, option in fields.items())
        question = line["question"].replace(" Please answer yes or no.", "")
        ending = _LETTER["_CN" in dataset] if options else _UNANSWERABLE * (dataset == "VizWiz") + _SHORT
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": hint + question + options + ending}]

    @torch.inference_mode()
    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """Returns the answer to a message of texts and image paths."""
        images = [Image.open(part["value"]) for part in message if part["type"] == "image"]
        text = "".join(part["value"] for part in message if part["type"] == "text")
        content = [{"type": "image"}] * len(images)
        content.append({"type": "text", "text": text.replace(self.processor.image_token, "")})
        turns = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[prompt], images=images or None, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, **self.settings)[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(output, skip_special_tokens=True).strip()
