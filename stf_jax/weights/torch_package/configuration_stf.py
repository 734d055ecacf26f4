"""LLaVA-STF's configuration (arXiv 2506.07138) for transformers."""

from transformers import AutoConfig, PretrainedConfig


class LlavaSTFConfig(PretrainedConfig):
    """Configures a vision tower, a token fusion and a language model.

    Args:
      vision_config, text_config: configs of the tower and the language model, or dicts with their ``model_type``.
      stf_config: how the tower's states become image tokens: ``fusion`` (``avg_pool``, ``pixel_shuffle``, ``ldp_v2``,
        ``c_abstractor``, ``resampler``, ``token_packer``, ``mqt``, ``stf``, ``mlp``, ``mbtf``, ``mbtf_stf``), ``taps``
        (blocks of the tower, 1-based, deepest first; 0 is the embedding), ``kernel`` (side of the window of patches
        that becomes one token), ``mbtf_hidden``, ``mbtf_width``, ``stf_hidden`` (channels), ``depth`` (blocks of the
        resampler, and of each side of the abstractor), ``variant`` (``code`` or ``paper``), ``budgets`` (numbers of
        tokens that the model makes of an image) and ``pad_grid`` (pad grids that the kernel does not divide); and
        ``tiles``, if images have them: ``tokens`` of each tile, and ``marks`` (``newline`` or ``none``).
      image_token_id: id of ``<image>``, which occurs once per image token. It needs no row in the embedding, because it
        is never embedded.
    """

    model_type = "llava_stf"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (declared by transformers)

    def __init__(self, vision_config=None, text_config=None, stf_config=None, image_token_id=None, **kwargs):
        self.vision_config = _to_config(vision_config or {"model_type": "clip_vision_model"})
        self.text_config = _to_config(text_config or {"model_type": "llama"})
        self.stf_config = stf_config or {}
        self.image_token_id = image_token_id
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)


def _to_config(values):
    return AutoConfig.for_model(**values) if isinstance(values, dict) else values
