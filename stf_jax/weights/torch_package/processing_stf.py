"""Images and prompts for LLaVA-STF: each ``<image>`` becomes as many ids as the fusion gives image tokens."""

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class LlavaSTFProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer.

    Args:
      num_image_tokens: ids that one image takes.
      image_token: what stands for an image in a text.
      begin: what a text begins with, where it does not say so itself: the BOS token, if the model was trained with it.
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
        begin="",
        chat_template=None,
        **_,
    ):
        self.num_image_tokens = num_image_tokens
        self.begin = begin
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """``input_ids`` and ``attention_mask`` of texts, and ``pixel_values`` of images, in the order of the texts.

        Args:
          images: one image, a list, a list of lists (one a text), or an array or tensor of so many images.
          text: one text or a list. The names of special tokens in it are those tokens.
          kwargs: of the tokenizer's ``pad`` and of the image processor; ``add_special_tokens=False`` leaves out what
            is put before a text; ``return_mm_token_type_ids`` adds 1 for image tokens, 0 for text, and
            ``return_text_replacement_offsets`` where the images stood, both as servers ask for them.

        Raises:
          ValueError: ``<image>`` does not stand once for each image, or the text is to be cut.
        """
        if kwargs.pop("truncation", False):
            raise ValueError("Texts are not truncated here: a cut could go through an image.")
        images = _flat(images)
        tensors = kwargs.pop("return_tensors", None)
        if text is None:
            return self._pixels(images, tensors, kwargs)
        text = [text] if isinstance(text, str) else list(text)
        marks = sum(one.count(self.image_token) for one in text)
        if marks != len(images):
            raise ValueError(f"The text has {marks} {self.image_token}, but there are {len(images)} images.")
        begin = self.begin if kwargs.pop("add_special_tokens", True) else ""
        types = kwargs.pop("return_mm_token_type_ids", False)
        offsets = kwargs.pop("return_text_replacement_offsets", False)
        sides = {key: kwargs.pop(key) for key in ("padding", "padding_side", "max_length") if key in kwargs}
        ids = {"input_ids": [self._ids(one if one.startswith(begin) else begin + one) for one in text]}
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
            batch.update(self._pixels(images, tensors, kwargs))
        if offsets:
            tokens = [self.replace_image_token(batch, i) for i in range(len(images))]
            batch["text_replacement_offsets"] = self.get_text_with_replacements(text, tokens)[1]
        return batch

    def _pixels(self, images, tensors, kwargs):
        kwargs = {key: value for key, value in kwargs.items() if key in ("device", "do_resize", "do_center_crop")}
        pixels = self.image_processor(images, return_tensors=tensors, **kwargs)["pixel_values"]
        return BatchFeature({"pixel_values": pixels}, tensor_type=tensors)

    def replace_image_token(self, image_inputs, image_idx, **kwargs) -> str:
        """What stands in a text for an image; transformers 5 and servers ask for it."""
        return self.image_token * self.num_image_tokens

    def _ids(self, text):
        text = text.replace(self.image_token, self.image_token * self.num_image_tokens)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """For vLLM: ids that each image takes, whatever its size."""
        from transformers.processing_utils import MultiModalData

        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]


def _flat(images):
    """One image after the other, of images, lists of them, and arrays that hold many."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4:
        return [image for part in images for image in _flat(part)]
    return [images]
