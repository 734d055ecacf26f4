"""The same in PyTorch, for exports."""

from torch import nn


class Connector(nn.Module):
    def __init__(self, config, side):
        super().__init__()
        channels = config.vision_config.hidden_size * len(config.stf_config["taps"])
        self.pool = nn.MaxPool2d(config.stf_config["kernel"])
        self.out = nn.Linear(channels, config.text_config.hidden_size)

    def forward(self, x):
        return self.out(self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
