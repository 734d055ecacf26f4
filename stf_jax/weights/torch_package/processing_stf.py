"""Prepares images and prompts for LLaVA-STF: each ``<image>`` becomes one id per image token."""

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .tiles_stf import count_tokens


class LlavaSTFProcessor(ProcessorMixin):
    """Combines an image processor and a tokenizer.

    Args:
      image_processor: prepares the images.
      tokenizer: tokenizes the texts.
      num_image_tokens: ids per image; of images in tiles, those of each tile.
      budgets: the numbers of ids per image that a call may choose; empty if it may not.
      tiles: for images in tiles, ``tokens`` and ``marks`` of :func:`tiles_stf.count_tokens`.
      image_token: the placeholder of an image in a text.
      begin: a prefix for texts that lack it: the BOS token, if the model was trained with it.
      chat_template: the Jinja template of conversations.
    """

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers before 5 does not infer them from __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=144,
        budgets=(),
        tiles=None,
        image_token="<image>",
        begin="",
        chat_template=None,
        **_,
    ):
        self.num_image_tokens, self.budgets = num_image_tokens, tuple(budgets) or (num_image_tokens,)
        self.tiles = tiles
        self.begin = begin
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, num_image_tokens=None, **kwargs) -> BatchFeature:
        """Returns ``input_ids`` and ``attention_mask`` of texts, and ``pixel_values`` of images in the same order.

        Args:
          images: one image, a list, a list of lists (one per text), or an array or tensor of several images.
          text: one text or a list. Names of special tokens in it become those tokens.
          num_image_tokens: ids per image, one of the budgets; by default ``num_image_tokens`` of the processor.
          kwargs: options of the tokenizer's ``pad`` and of the image processor. ``add_special_tokens=False`` omits the
            prefix ``begin``. Servers use ``return_mm_token_type_ids`` (1 for image tokens, 0 for text) and
            ``return_text_replacement_offsets`` (the positions of the images).

        Raises:
          ValueError: the number of ``<image>`` differs from the number of images, truncation is requested, or
            ``num_image_tokens`` is no budget.
        """
        if kwargs.pop("truncation", False):
            raise ValueError("Truncation is not supported: it could cut through an image.")
        count = num_image_tokens or self.num_image_tokens
        if count not in self.budgets:
            raise ValueError(f"num_image_tokens={count} is not among {', '.join(map(str, self.budgets))}.")
        images = _flatten(images)
        tensors = kwargs.pop("return_tensors", None)
        if text is None:
            return self._pixel_values(images, tensors, kwargs)
        text = [text] if isinstance(text, str) else list(text)
        num_marks = sum(one.count(self.image_token) for one in text)
        if num_marks != len(images):
            raise ValueError(f"The text has {num_marks} {self.image_token}, but there are {len(images)} images.")
        begin = self.begin if kwargs.pop("add_special_tokens", True) else ""
        return_types = kwargs.pop("return_mm_token_type_ids", False)
        return_offsets = kwargs.pop("return_text_replacement_offsets", False)
        padding = {key: kwargs.pop(key) for key in ("padding", "padding_side", "max_length") if key in kwargs}
        pixels = self._pixel_values(images, tensors, kwargs) if images else {}
        counts = [self._count_tokens(pixels, i) if self.tiles else count for i in range(len(images))]
        left = iter(counts)
        ids = {"input_ids": [self._input_ids(one if one.startswith(begin) else begin + one, left) for one in text]}
        if len(text) > 1 or padding:
            padding.setdefault("padding", tensors is not None)
            data = self.tokenizer.pad(ids, **padding)
        else:
            data = ids | {"attention_mask": [[1] * len(ids["input_ids"][0])]}
        data = dict(data)
        if return_types:
            data["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in data["input_ids"]]
        batch = BatchFeature(data, tensor_type=tensors)
        batch.update(pixels)
        if return_offsets:
            tokens = [self.image_token * each for each in counts]
            batch["text_replacement_offsets"] = self.get_text_with_replacements(text, tokens)[1]
        return batch

    def _pixel_values(self, images, tensors, kwargs):
        kwargs = {key: value for key, value in kwargs.items() if key in ("device", "do_resize", "do_center_crop")}
        processed = self.image_processor(images, return_tensors=tensors, **kwargs)
        names = ["pixel_values", "image_sizes"] if self.tiles else ["pixel_values"]
        return BatchFeature({name: processed[name] for name in names}, tensor_type=tensors)

    def _count_tokens(self, image_inputs, image_idx):
        """Returns the ids of an image, by the output of the image processor."""
        return self._count_by_size(image_inputs["image_sizes"][image_idx] if self.tiles else None)

    def _count_by_size(self, size):
        if not self.tiles:
            return self.num_image_tokens
        size = [int(length) for length in size]
        side = self.image_processor.crop_size["height"]
        return count_tokens(size, **self.tiles, pinpoints=self.image_processor.image_grid_pinpoints, side=side)

    def replace_image_token(self, image_inputs, image_idx, **kwargs) -> str:
        """Returns the text that replaces ``<image>``; called by transformers 5 and servers."""
        return self.image_token * self._count_tokens(image_inputs, image_idx)

    def _input_ids(self, text, counts):
        first, *rest = text.split(self.image_token)
        text = first + "".join(self.image_token * next(counts) + part for part in rest)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Returns the ids of images of these heights and widths; called by vLLM."""
        from transformers.processing_utils import MultiModalData

        counts = [self._count_by_size(size) for size in image_sizes or []]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values", *["image_sizes"] * bool(self.tiles)]


def _flatten(images):
    """Returns a list of single images from an image, nested lists, or arrays of several images."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4:
        return [image for part in images for image in _flatten(part)]
    return [images]
