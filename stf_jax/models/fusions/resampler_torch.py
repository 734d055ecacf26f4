"""Honeybee's resampler (arXiv 2312.06742) in PyTorch, for exports: [I, g, g, C] → [I, h, h, D]."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .layers_stf import Attention


class Connector(nn.Module):
    """Trainable queries that attend to the patches."""

    def __init__(self, config, side):
        super().__init__()
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.n = math.ceil(side / config.stf_config["kernel"])
        self.query_tokens = nn.Parameter(torch.zeros(self.n**2, width))
        self.input = nn.Linear(width, width)
        self.layers = nn.ModuleList(ResamplerLayer(width) for _ in range(config.stf_config["depth"]))
        self.output = nn.Linear(width, out)

    def forward(self, x):
        patches = self.input(x.flatten(1, 2))
        queries = self.query_tokens.expand(len(x), -1, -1)
        for layer in self.layers:
            queries = layer(queries, patches)
        return self.output(queries).unflatten(1, (self.n, self.n))


class ResamplerLayer(nn.Module):
    """A layer in which queries [I, N, C] attend to themselves and to patches [I, P, C]."""

    def __init__(self, width):
        super().__init__()
        self.query_norm, self.patch_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, 64)
        self.gate_proj, self.up_proj = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.hidden_norm = nn.LayerNorm(4 * width, eps=1e-6)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, queries, patches):
        queries = self.query_norm(queries)
        keys = torch.cat([queries, self.patch_norm(patches)], dim=1)
        x = queries + self.attention(queries, keys, keys)
        y = self.mlp_norm(x)
        return x + self.down_proj(self.hidden_norm(F.silu(self.gate_proj(y)) * self.up_proj(y)))
