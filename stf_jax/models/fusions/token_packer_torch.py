"""TokenPacker (arXiv 2407.02392) in PyTorch, for exports: [I, g, g, C] → [I, h, h, D]."""

from torch import nn
from torch.nn import functional as F

from .layers_stf import Attention, mlp


class Connector(nn.Module):
    """A coarse query attends to the patches of its window, in all taps."""

    def __init__(self, config, side):
        del side
        super().__init__()
        self.kernel = config.stf_config["kernel"]
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        tapped = len(config.stf_config["taps"]) * width
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = mlp(tapped, width), mlp(tapped, width)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = Attention(width, 128)
        self.mlp = mlp(width, out)

    def forward(self, x):
        k, n, images, width = self.kernel, x.shape[1] // self.kernel, len(x), self.query.in_features
        coarse = F.interpolate(x[..., :width].permute(0, 3, 1, 2).float(), size=(n, n), mode="bilinear")
        queries = self.query_norm(self.query(coarse.permute(0, 2, 3, 1).to(x.dtype)))

        def windows(y):
            return y.unfold(1, k, k).unfold(2, k, k).flatten(4).flatten(0, 2).transpose(1, 2)

        keys, values = self.key_norm(self.key(x)), self.value_norm(self.value(x))
        attended = self.attention(queries.flatten(0, 2)[:, None], windows(keys), windows(values))
        return self.mlp(attended.view(images, n, n, -1))
