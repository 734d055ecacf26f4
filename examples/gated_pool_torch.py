"""The same fusion in PyTorch, which `convert export --format=hf` copies to the export."""

from torch import nn


class Connector(nn.Module):
    def __init__(self, config, side):
        super().__init__()
        self.kernel = config.stf_config["kernel"]
        channels = config.vision_config.hidden_size * len(config.stf_config["taps"])
        out = config.text_config.hidden_size
        self.score, self.first, self.second = nn.Linear(channels, 1), nn.Linear(channels, out), nn.Linear(out, out)

    def forward(self, x):
        windows = x.unflatten(2, (-1, self.kernel)).unflatten(1, (-1, self.kernel)).transpose(2, 3).flatten(3, 4)
        pooled = (self.score(windows).softmax(3) * windows).sum(3)
        return self.second(nn.functional.gelu(self.first(pooled)))
