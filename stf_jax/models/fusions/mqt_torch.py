"""The Matryoshka Query Transformer (arXiv 2405.19315) in PyTorch, for exports: [I, g, g, C] → [I, N, D]."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .layers_stf import Attention


class Connector(nn.Module):
    """Trainable queries, of which the first attend to the patches; keys are positions alone."""

    def __init__(self, config, side):
        super().__init__()
        fusion = config.stf_config
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        first, *_ = [*fusion["budgets"], math.ceil(side / fusion["kernel"]) ** 2]
        self.n = math.isqrt(first)
        self.query_tokens = nn.Parameter(torch.zeros(first, width))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = Attention(width, 64)
        self.output = nn.Linear(width, out, bias=False)

    def forward(self, x):
        return self.nested(x, self.n**2)

    def nested(self, x, count):
        """Returns the tokens of the first queries."""
        images, side, _, width = x.shape
        positions = _sine_positions(self.n, width).to(x.device)
        grid = positions.T.view(1, width, self.n, self.n)
        places = F.interpolate(grid, (side, side), mode="bicubic").flatten(2).transpose(1, 2).to(x.dtype)
        queries = self.query_norm((self.query_tokens + positions)[:count].to(x.dtype)).expand(images, -1, -1)
        keys = self.key_norm(places).expand(images, -1, -1)
        return self.output(self.attention(queries, keys, self.value_norm(x.flatten(1, 2))))


def _sine_positions(side, width):
    """Returns the fixed embeddings of the cells of a grid [side², width]: of the column, then of the row."""
    frequencies = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
    return torch.cat([columns, rows], dim=1).float()
