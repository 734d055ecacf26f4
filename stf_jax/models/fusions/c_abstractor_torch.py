"""Honeybee's C-Abstractor (arXiv 2312.06742) in PyTorch, for exports: [I, g, g, C] → [I, h, h, D]."""

import torch
from torch import nn
from torch.nn import functional as F

from .layers_stf import mlp


class Connector(nn.Module):
    """Convolutional blocks before and after pooling, with learned positions."""

    def __init__(self, config, side):
        super().__init__()
        self.kernel = config.stf_config["kernel"]
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.position_embedding = nn.Parameter(torch.zeros(side**2, width))
        before, after = ([RegNetBlock(width) for _ in range(config.stf_config["depth"])] for _ in range(2))
        self.before, self.after = nn.Sequential(*before), nn.Sequential(*after)
        self.mlp = mlp(width, out, nn.SiLU())

    def forward(self, x):
        x = (x + self.position_embedding.view(x.shape[1:])).permute(0, 3, 1, 2)
        x = self.after(F.avg_pool2d(self.before(x), self.kernel))
        return self.mlp(x.permute(0, 2, 3, 1))


class RegNetBlock(nn.Module):
    """RegNet-Y's block with groups of one channel, layer norms and SiLU: [I, C, g, g] → [I, C, g, g]."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        squeezed = round(width / 4)
        self.squeeze, self.excite = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        y = F.silu(_over_channels(self.norm1, self.conv1(x)))
        y = F.silu(_over_channels(self.norm2, self.conv2(y)))
        y = y * self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return F.silu(x + _over_channels(self.norm3, self.conv3(y)))


def _over_channels(norm, x):
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
