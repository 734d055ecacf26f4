"""Merged windows and a projector in PyTorch, for exports: [I, g, g, C] → [I, h, h, D]."""

from torch import nn


class Connector(nn.Sequential):
    """Two linear layers with a GELU between, over windows."""

    def __init__(self, config, side):
        del side
        kernel, averages = config.stf_config["kernel"], config.stf_config["fusion"] == "avg_pool"
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        super().__init__(nn.Linear(width if averages else kernel**2 * width, out), nn.GELU(), nn.Linear(out, out))
        self.kernel, self.averages = kernel, averages

    def forward(self, x):
        x = x.unflatten(2, (-1, self.kernel)).unflatten(1, (-1, self.kernel)).transpose(2, 3)
        return super().forward(x.mean((3, 4)) if self.averages else x.flatten(3))
