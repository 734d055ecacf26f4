"""LLaVA's projector, which follows MBTF at each patch, in PyTorch, for exports: [I, g, g, C] → [I, h, h, D]."""

from torch import nn


class Connector(nn.Sequential):
    """Two linear layers with a GELU between."""

    def __init__(self, config, side):
        del side
        width, out = config.stf_config["mbtf_width"], config.text_config.hidden_size
        super().__init__(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
