"""MobileVLM V2's projector (arXiv 2402.03766) in PyTorch, for exports: [I, g, g, C] → [I, h, h, D]."""

from torch import nn
from torch.nn import functional as F

from .layers_stf import mlp


class Connector(nn.Module):
    """A projector, the mean of windows, and a depth-wise convolution added to it."""

    def __init__(self, config, side):
        del side
        super().__init__()
        self.kernel = config.stf_config["kernel"]
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.mlp = mlp(width, out)
        self.peg = nn.Conv2d(out, out, 3, padding=1, groups=out)

    def forward(self, x):
        x = F.avg_pool2d(self.mlp(x).permute(0, 3, 1, 2), self.kernel)
        return (x + self.peg(x)).permute(0, 2, 3, 1)
