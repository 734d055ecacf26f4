"""Configuration of LLaVA-STF (arXiv 2506.07138) for transformers."""

from transformers import AutoConfig, PretrainedConfig


class LlavaSTFConfig(PretrainedConfig):
    """A vision tower, a token fusion and a language model.

    Args:
      vision_config, text_config: of the tower and the language model, or dicts with their ``model_type``.
      stf_config: how the tower's states become image tokens: ``fusion`` (``avg_pool``, ``pixel_shuffle``, ``ldp_v2``,
        ``c_abstractor``, ``resampler``, ``token_packer``, ``stf``, ``mbtf``, ``mbtf_stf``), ``taps`` (blocks of the
        tower, 1-based, deepest first; 0 is the embedding), ``kernel`` (patches a side that become one token),
        ``mbtf_hidden``, ``mbtf_width``, ``stf_hidden`` (channels), ``depth`` (blocks of the resampler, and of the
        abstractor on each side), ``variant`` (``code`` or ``paper``) and ``pad_grid`` (pad a grid that the kernel does
        not divide).
      image_token_id: id of ``<image>``, which stands once for each image token. It need not have a row in the
        embedding: it is never looked up.
    """

    model_type = "llava_stf"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (theirs to declare)

    def __init__(self, vision_config=None, text_config=None, stf_config=None, image_token_id=None, **kwargs):
        self.vision_config = _config(vision_config or {"model_type": "clip_vision_model"})
        self.text_config = _config(text_config or {"model_type": "llama"})
        self.stf_config = stf_config or {}
        self.image_token_id = image_token_id
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)


def _config(values):
    return AutoConfig.for_model(**values) if isinstance(values, dict) else values
