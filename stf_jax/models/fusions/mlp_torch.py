"""LLaVA's projector at each patch, after MBTF or alone, in PyTorch, for exports: [I, g, g, C] → [I, g, g, D]."""

from torch import nn


class Connector(nn.Sequential):
    """Two linear layers with a GELU between."""

    def __init__(self, config, side):
        del side
        fusion, out = config.stf_config, config.text_config.hidden_size
        width = fusion["mbtf_width"] if fusion["crosslayer"] else config.vision_config.hidden_size
        super().__init__(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
