"""A data source of one's own: squares of one color, drawn on demand, with a question about the color."""

import functools

import numpy as np
import PIL.Image

from stf_jax.data.records import Record, Turn

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}


def draw(color, left, top):
    image = PIL.Image.new("RGB", (96, 96), "white")
    image.paste(COLORS[color], (left, top, left + 32, top + 32))
    return image


class Squares:
    name = "colored squares"

    def __init__(self, seed, size):
        self.seed, self.size = seed, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        color, (left, top) = rng.choice([*COLORS]), rng.integers(0, 64, 2).tolist()
        turns = Turn("human", "<image>\nWhat color is the square?"), Turn("gpt", f"The square is {color}.")
        return Record(f"square-{index}", (functools.partial(draw, color, left, top),), turns)


def open_squares(config):
    return [Squares(config.seed, size=1000)]
