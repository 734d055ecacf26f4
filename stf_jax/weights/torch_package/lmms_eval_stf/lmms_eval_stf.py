"""Models that STF-JAX exports, for lmms-eval: ``--model llava_stf --model_args pretrained=EXPORT``.

They are asked as they were trained: through the export's chat template, a question's images before its text.
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
    """An export of STF-JAX, whatever its fusion.

    lmms-eval's "simple" interface serves all its kinds of tasks, the "chat" one not those that compare given answers;
    and whatever stands between images, the model was trained with them first.

    Args:
      pretrained: folder of the export. Its code is run; nothing is downloaded.
      device: of the model; with several processes each takes its own.
      dtype: type of the weights, such as ``bfloat16``; ``auto`` is the export's own.
      batch_size: questions read together.

    Raises:
      ValueError: ``pretrained`` is no folder of a model, or a task shows something other than images.
    """

    def __init__(self, pretrained: str, device: str | None = None, dtype: str = "auto", batch_size: int | str = 1):
        super().__init__()
        if not os.path.isfile(os.path.join(pretrained, "config.json")):
            raise ValueError(f"pretrained={pretrained} is not a folder of an export: it has no config.json.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be a number from 1.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        alone = self.accelerator.num_processes == 1
        self.device = torch.device(device) if device and alone else self.accelerator.device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        how = {"trust_remote_code": True, "local_files_only": True}
        self.processor = AutoProcessor.from_pretrained(pretrained, **how)
        self.processor.tokenizer.padding_side = "left"
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, **how)
        self.model = model.to(self.device).eval()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each request, cut before the first of its ``until``, without white space around it."""
        answers = [""] * len(requests)
        for batch in self._batches(requests):
            contexts, settings, *where = zip(*(requests[i].args for i in batch), strict=True)
            shown = [self._images(*one) for one in zip(*where, strict=True)]
            for i, answer in zip(batch, self._answer(contexts, shown, settings[0]), strict=True):
                answers[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args[:2], answer)
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request; a round is asked by itself, as the task words it."""
        conversations = []
        for request in tqdm(requests, disable=self.rank != 0):
            context, settings, doc_to_visual, doc_to_text, *where = request.args
            document, shown = self._document(*where), self._images(doc_to_visual, *where)
            said, info = [], None
            for number in itertools.count(1):
                said = [*said, *self._answer([context], [shown], settings)]
                visuals, context, over, said, info = doc_to_text(
                    document, previous_output=said, round_idx=number, previous_round_info=info
                )
                if over:
                    break
                shown = _checked(visuals, where[1])
            conversations.append(list(said))
            self.cache_hook.add_partial("generate_until_multi_round", request.args[:2], conversations[-1])
        return conversations

    def loglikelihood(self, requests: list[Instance]) -> list["Score"]:
        """The log-probability of each answer after its question, over the answer's tokens; and whether greedy says it.

        Answers begin and are tokenised as in training; the end of the turn is not among them. Where lmms-eval compares
        given answers, what it is given is the probability's negative: it takes the smallest for the best.
        """
        scores = [Score((0.0, True))] * len(requests)
        for batch in self._batches(requests):
            prompts, whole, shown, signs = [], [], [], []
            for i in batch:
                context, answer, doc_to_visual, *where = requests[i].args
                signs.append(-1 if isinstance(answer, str) else 1)
                answer = answer if isinstance(answer, str) else answer(self._document(*where))
                shown.append(self._images(doc_to_visual, *where))
                prompts.append(self._prompt(context, shown[-1]))
                whole.append(self._prompt(context, shown[-1], answer.strip()))
            for i, sign, (value, greedy) in zip(batch, signs, self._scores(prompts, whole, shown), strict=True):
                scores[i] = Score((sign * value, greedy))
                self.cache_hook.add_partial("loglikelihood", requests[i].args[:2], scores[i])
        return scores

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Indices of requests with equal settings, the longest first."""

        def settings(i):
            given = requests[i].args[1]
            return repr(sorted(given.items())) if isinstance(given, dict) else ""

        order = sorted(range(len(requests)), key=lambda i: (settings(i), -len(requests[i].args[0])))
        with tqdm(total=len(requests), disable=self.rank != 0) as bar:
            for _, alike in itertools.groupby(order, settings):
                alike = list(alike)
                for first in range(0, len(alike), self.batch_size):
                    batch = alike[first : first + self.batch_size]
                    yield batch
                    bar.update(len(batch))

    def _document(self, doc_id, task, split):
        return self.task_dict[task][split][doc_id]

    def _images(self, doc_to_visual, doc_id, task, split):
        return _checked(doc_to_visual(self._document(doc_id, task, split)), task)

    def _prompt(self, context, images, answer=None):
        """The text that the model reads, up to the answer's end where it is given."""
        text = {"type": "text", "text": context.replace(self.processor.image_token, "")}
        turns = [{"role": "user", "content": [*[{"type": "image"}] * len(images), text]}]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if answer is None:
            return prompt
        turns.append({"role": "assistant", "content": answer})
        whole = self.processor.apply_chat_template(turns, tokenize=False)
        return whole[: whole.index(answer, len(prompt)) + len(answer)]

    def _read(self, texts, shown):
        images = list(itertools.chain(*shown)) or None
        inputs = self.processor(text=list(texts), images=images, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.model.dtype)

    @torch.inference_mode()
    def _answer(self, contexts, shown, settings):
        inputs = self._read([self._prompt(*one) for one in zip(contexts, shown, strict=True)], shown)
        # Tasks name settings of other models there too, such as image_aspect_ratio.
        known = {
            key: value
            for key, value in settings.items()
            if value is not None and hasattr(self.model.generation_config, key)
        }
        warm = known.get("temperature", 1 if known.get("do_sample") else 0) > 0
        known["do_sample"] = warm and known.get("do_sample", True)
        if not known["do_sample"]:
            known = {key: value for key, value in known.items() if key not in ("temperature", "top_p", "top_k")}
        said = self.model.generate(**inputs, **{"max_new_tokens": 1024} | known)
        said = said[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            answers = [answer.split(stop)[0] if stop else answer for answer in answers]
        return [answer.strip() for answer in answers]

    @torch.inference_mode()
    def _scores(self, prompts, whole, shown):
        """Log-probability of what each whole text says beyond its prompt, and whether greedy decoding says it."""
        inputs = self._read(whole, shown)
        counts = []
        for prompt, images, ids, mask in zip(
            prompts, shown, inputs["input_ids"], inputs["attention_mask"], strict=True
        ):
            before = self._read([prompt], [images])["input_ids"][0].tolist()
            both = ids[mask.bool()].tolist()
            # Where the prompt's last token runs on into the answer, it is part of what is scored.
            alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, both, strict=False))
            counts.append(len(both) - len(list(alike)))
        longest = max(1, *counts)
        logits = self.model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
        never = self.model.generation_config.suppress_tokens
        if never:  # rows that nothing has trained; generating leaves them out too
            logits[..., never] = -torch.inf
        asked = inputs["input_ids"][:, -longest:]
        values = logits.log_softmax(-1).gather(-1, asked[..., None])[..., 0]
        likeliest = logits.argmax(-1) == asked
        for row, count in enumerate(counts):
            own = slice(longest - count, None)
            yield float(values[row, own].sum()), bool(likeliest[row, own].all())


class Score(GenerationResult, tuple):
    """A number and whether greedy decoding gives that answer.

    A pair, as lmms-eval asks for; of this kind because its evaluator (0.7.3) makes a string of any other.
    """


def _checked(visuals, task):
    visuals = visuals or []
    for one in visuals:
        if not isinstance(one, Image.Image):
            raise ValueError(f"Task {task} shows a {type(one).__name__}, but llava_stf reads images alone.")
    return visuals
