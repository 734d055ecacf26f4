"""Evaluates STF-JAX exports with lmms-eval: ``--model llava_stf --model_args pretrained=EXPORT``.

Prompts are built as in training: with the export's chat template, and the images of a question before its text.
"""

import itertools
import os
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

MANIFEST = ModelManifest("llava_stf", simple_class_path="lmms_eval_stf.LlavaSTF")


class LlavaSTF(lmms):
    """An STF-JAX export with any fusion.

    It implements lmms-eval's "simple" interface, which serves all kinds of tasks; the "chat" interface does not serve
    those that compare given answers, and allows text between images, on which these models were not trained.

    Args:
      pretrained: folder of the export. Its code is run; nothing is downloaded.
      device: device of the model; with several processes, each uses its own.
      dtype: dtype of the weights, such as ``bfloat16``; ``auto`` is the export's own.
      batch_size: questions per batch.

    Raises:
      ValueError: ``pretrained`` is not the folder of an export, or a task has inputs other than text and images.
    """

    def __init__(self, pretrained: str, device: str | None = None, dtype: str = "auto", batch_size: int | str = 1):
        super().__init__()
        if not os.path.isfile(os.path.join(pretrained, "config.json")):
            raise ValueError(f"pretrained={pretrained} is not a folder of an export: it has no config.json.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be a positive integer.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        is_single = self.accelerator.num_processes == 1
        self.device = torch.device(device) if device and is_single else self.accelerator.device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True, local_files_only=True)
        self.processor.tokenizer.padding_side = "left"
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, trust_remote_code=True, local_files_only=True
        )
        self.model = model.to(self.device).eval()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns an answer to each request, cut before its first ``until`` string and stripped."""
        answers = [""] * len(requests)
        for batch in self._batches(requests):
            contexts, settings, *sources = zip(*(requests[i].args for i in batch), strict=True)
            images = [self._load_images(*source) for source in zip(*sources, strict=True)]
            for i, answer in zip(batch, self._answer(contexts, images, settings[0]), strict=True):
                answers[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args[:2], answer)
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Returns the answers to all rounds of each request. Each round is a separate prompt, written by the task."""
        conversations = []
        for request in tqdm(requests, disable=self.rank != 0):
            context, settings, doc_to_visual, doc_to_text, *source = request.args
            document, images = self._load_document(*source), self._load_images(doc_to_visual, *source)
            answers, info = [], None
            for number in itertools.count(1):
                answers = [*answers, *self._answer([context], [images], settings)]
                visuals, context, is_last, answers, info = doc_to_text(
                    document, previous_output=answers, round_idx=number, previous_round_info=info
                )
                if is_last:
                    break
                images = _check_images(visuals, source[1])
            conversations.append(list(answers))
            self.cache_hook.add_partial("generate_until_multi_round", request.args[:2], conversations[-1])
        return conversations

    def loglikelihood(self, requests: list[Instance]) -> list["Score"]:
        """Returns the log-probability of each answer given its question, and whether greedy decoding gives that answer.

        Answers are tokenized as in training, without the end of the turn. For tasks that compare given answers, the
        log-probability is negated, because lmms-eval takes the smallest value as the best.
        """
        scores = [Score((0.0, True))] * len(requests)
        for batch in self._batches(requests):
            prompts, texts, images, signs = [], [], [], []
            for i in batch:
                context, answer, doc_to_visual, *source = requests[i].args
                signs.append(-1 if isinstance(answer, str) else 1)
                answer = answer if isinstance(answer, str) else answer(self._load_document(*source))
                images.append(self._load_images(doc_to_visual, *source))
                prompts.append(self._build_prompt(context, images[-1]))
                texts.append(self._build_prompt(context, images[-1], answer.strip()))
            for i, sign, (value, is_greedy) in zip(batch, signs, self._score(prompts, texts, images), strict=True):
                scores[i] = Score((sign * value, is_greedy))
                self.cache_hook.add_partial("loglikelihood", requests[i].args[:2], scores[i])
        return scores

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Yields indices of requests with equal settings, longest first."""

        def settings(i):
            value = requests[i].args[1]
            return repr(sorted(value.items())) if isinstance(value, dict) else ""

        order = sorted(range(len(requests)), key=lambda i: (settings(i), -len(requests[i].args[0])))
        with tqdm(total=len(requests), disable=self.rank != 0) as bar:
            for _, group in itertools.groupby(order, settings):
                group = list(group)
                for first in range(0, len(group), self.batch_size):
                    batch = group[first : first + self.batch_size]
                    yield batch
                    bar.update(len(batch))

    def _load_document(self, doc_id, task, split):
        return self.task_dict[task][split][doc_id]

    def _load_images(self, doc_to_visual, doc_id, task, split):
        return _check_images(doc_to_visual(self._load_document(doc_id, task, split)), task)

    def _build_prompt(self, context, images, answer=None):
        """Returns the prompt, followed by the answer if it is given."""
        text = {"type": "text", "text": context.replace(self.processor.image_token, "")}
        turns = [{"role": "user", "content": [*[{"type": "image"}] * len(images), text]}]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if answer is None:
            return prompt
        turns.append({"role": "assistant", "content": answer})
        conversation = self.processor.apply_chat_template(turns, tokenize=False)
        return conversation[: conversation.index(answer, len(prompt)) + len(answer)]

    def _encode(self, texts, images):
        flat = list(itertools.chain(*images)) or None
        inputs = self.processor(text=list(texts), images=flat, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.model.dtype)

    @torch.inference_mode()
    def _answer(self, contexts, images, settings):
        inputs = self._encode([self._build_prompt(*pair) for pair in zip(contexts, images, strict=True)], images)
        # Tasks also set options of other models, such as image_aspect_ratio.
        options = {
            key: value
            for key, value in settings.items()
            if value is not None and hasattr(self.model.generation_config, key)
        }
        has_temperature = options.get("temperature", 1 if options.get("do_sample") else 0) > 0
        options["do_sample"] = has_temperature and options.get("do_sample", True)
        if not options["do_sample"]:
            options = {key: value for key, value in options.items() if key not in ("temperature", "top_p", "top_k")}
        output = self.model.generate(**inputs, **{"max_new_tokens": 1024} | options)
        output = output[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.tokenizer.batch_decode(output, skip_special_tokens=True)
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            answers = [answer.split(stop)[0] if stop else answer for answer in answers]
        return [answer.strip() for answer in answers]

    @torch.inference_mode()
    def _score(self, prompts, texts, images):
        """Yields the log-probability of each text after its prompt, and whether greedy decoding gives that text."""
        inputs = self._encode(texts, images)
        counts = []
        for prompt, own_images, ids, mask in zip(
            prompts, images, inputs["input_ids"], inputs["attention_mask"], strict=True
        ):
            prompt_ids = self._encode([prompt], [own_images])["input_ids"][0].tolist()
            text_ids = ids[mask.bool()].tolist()
            # If the prompt's last token merges with the answer, it is scored too.
            common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, text_ids, strict=False))
            counts.append(len(text_ids) - len(list(common)))
        longest = max(1, *counts)
        logits = self.model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
        suppressed = self.model.generation_config.suppress_tokens
        if suppressed:  # untrained rows, which generation suppresses too
            logits[..., suppressed] = -torch.inf
        targets = inputs["input_ids"][:, -longest:]
        values = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        is_greedy = logits.argmax(-1) == targets
        for row, count in enumerate(counts):
            answer = slice(longest - count, None)
            yield float(values[row, answer].sum()), bool(is_greedy[row, answer].all())


class Score(GenerationResult, tuple):
    """A log-probability and whether greedy decoding gives the answer.

    lmms-eval expects a pair; it must be a GenerationResult, because the evaluator (0.7.3) converts other types to str.
    """


def _check_images(visuals, task):
    visuals = visuals or []
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise ValueError(
                f"Task {task} has an input of type {type(visual).__name__}; llava_stf supports only images."
            )
    return visuals
