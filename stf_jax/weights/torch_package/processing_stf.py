"""Pictures and prompts for LLaVA-STF: each ``<image>`` becomes as many ids as the fusion gives image tokens."""

import re

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class LlavaSTFProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer.

    Args:
      num_image_tokens: ids that one picture takes.
      image_token: what stands for a picture in a text.
      control_tokens: special tokens of the chat template. Other names of special tokens in a text are text.
    """

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers before 5 cannot tell them from __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=144,
        image_token="<image>",
        control_tokens=(),
        chat_template=None,
        **_,
    ):
        self.num_image_tokens = num_image_tokens
        self.control_tokens = list(control_tokens)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """``input_ids`` and ``attention_mask`` of texts, and ``pixel_values`` of pictures, in the order of the texts.

        The model was trained on text tokenised from mark to mark (``<image>``, control tokens), each piece as if a text
        began there; so it is here.

        Args:
          images: one picture or a list of them, or a list of lists, one a text.
          text: one text or a list.
          kwargs: of the tokenizer's ``pad`` and of the image processor; ``add_special_tokens=False`` leaves out what
            the tokenizer puts before a text; ``return_mm_token_type_ids`` adds 1 for image tokens, 0 for text, and
            ``return_text_replacement_offsets`` where the pictures stood, both as servers ask for them.

        Raises:
          ValueError: ``<image>`` does not stand once for each picture, or the text is to be cut.
        """
        if kwargs.pop("truncation", False):
            raise ValueError("Texts are not truncated here: a cut could go through a picture.")
        images = [] if images is None else images
        images = [p for group in images for p in group] if _nested(images) else _listed(images)
        tensors = kwargs.pop("return_tensors", None)
        if text is None:
            return self._pictures(images, tensors, kwargs)
        text = [text] if isinstance(text, str) else list(text)
        marks = sum(one.count(self.image_token) for one in text)
        if marks != len(images):
            raise ValueError(f"The text has {marks} {self.image_token}, but there are {len(images)} pictures.")
        begin = kwargs.pop("add_special_tokens", True)
        types = kwargs.pop("return_mm_token_type_ids", False)
        offsets = kwargs.pop("return_text_replacement_offsets", False)
        sides = {key: kwargs.pop(key) for key in ("padding", "padding_side", "max_length") if key in kwargs}
        ids = {"input_ids": [self._ids(one, begin) for one in text]}
        if len(text) > 1 or sides:
            sides.setdefault("padding", tensors is not None)
            data = self.tokenizer.pad(ids, **sides)
        else:
            data = ids | {"attention_mask": [[1] * len(ids["input_ids"][0])]}
        data = dict(data)
        if types:
            data["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in data["input_ids"]]
        batch = BatchFeature(data, tensor_type=tensors)
        if images:
            batch.update(self._pictures(images, tensors, kwargs))
        if offsets:
            tokens = [self.replace_image_token(batch, i) for i in range(len(images))]
            batch["text_replacement_offsets"] = self.get_text_with_replacements(text, tokens)[1]
        return batch

    def _pictures(self, images, tensors, kwargs):
        kwargs = {key: value for key, value in kwargs.items() if key in ("device", "do_resize", "do_center_crop")}
        pixels = self.image_processor(images, return_tensors=tensors, **kwargs)["pixel_values"]
        return BatchFeature({"pixel_values": pixels}, tensor_type=tensors)

    def replace_image_token(self, image_inputs, image_idx, **kwargs) -> str:
        """What stands in a text for a picture; transformers 5 and servers ask for it."""
        return self.image_token * self.num_image_tokens

    def _ids(self, text, begin):
        def tokens(piece, **how):
            return self.tokenizer(piece, split_special_tokens=True, **how).input_ids

        ids = [token for token in tokens("") if token != self.tokenizer.eos_token_id] if begin else []
        marks = "|".join(re.escape(mark) for mark in (self.image_token, *self.control_tokens))
        for piece in re.split(f"({marks})", text):
            if piece == self.image_token:
                ids += [self.image_token_id] * self.num_image_tokens
            elif piece in self.control_tokens:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                ids += tokens(piece, add_special_tokens=False)
        return ids

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """For vLLM: ids that each picture takes, whatever its size."""
        from transformers.processing_utils import MultiModalData

        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]


def _listed(images):
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _nested(images):
    return isinstance(images, (list, tuple)) and len(images) > 0 and isinstance(images[0], (list, tuple))
