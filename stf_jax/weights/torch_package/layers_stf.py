"""Layers that the fusions of several models share."""

import math

from torch import nn
from torch.nn import functional as F


def mlp(width, out, activation=None):
    """Returns two linear layers with an activation between."""
    return nn.Sequential(nn.Linear(width, out), activation or nn.GELU(), nn.Linear(out, out))


class Attention(nn.Module):
    """Attention of [I, T, C] to keys and values [I, S, C]; heads have gcd(C, ``size``) channels."""

    def __init__(self, width, size):
        super().__init__()
        self.size = math.gcd(width, size)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query, key, value):
        heads = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        heads = (x.unflatten(-1, (-1, self.size)).transpose(1, 2) for x in heads)
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
