"""Spatial token fusion (arXiv 2506.07138) in PyTorch, for exports: [I, g, g, C] → [I, h, h, D]."""

import itertools
import math

from torch import nn
from torch.nn import functional as F


class Connector(nn.Sequential):
    """Linear layers over the values of a window, channel by channel, as in the authors' code."""

    def __init__(self, config, side):
        del side
        fusion = config.stf_config
        window = fusion["kernel"] ** 2 * (
            fusion["mbtf_width"] if fusion["crosslayer"] else config.vision_config.hidden_size
        )
        is_paper = fusion["variant"] == "paper"
        sizes = [window, *[window] * is_paper, fusion["stf_hidden"], config.text_config.hidden_size]
        layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
        super().__init__(*(layers if is_paper else layers[:-1]))
        self.kernel = fusion["kernel"]

    def forward(self, x):
        x = self._pad(x)
        x = x.unflatten(2, (-1, self.kernel)).unflatten(1, (-1, self.kernel))
        return super().forward(x.permute(0, 1, 3, 5, 2, 4).flatten(3))

    def nested(self, x, count):
        """Returns ``count`` tokens: those of a grid of means of patches, or of copies."""
        x = self._pad(x)
        side, wanted = x.shape[1], self.kernel * math.isqrt(count)
        if wanted > side:
            x = x.repeat_interleave(wanted // side, 1).repeat_interleave(wanted // side, 2)
        return self(x.unflatten(2, (wanted, -1)).unflatten(1, (wanted, -1)).mean((2, 4)))

    def _pad(self, x):
        pad = -x.shape[1] % self.kernel
        return F.pad(x, (0, 0, 0, pad, 0, pad))
