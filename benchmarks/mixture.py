"""Synthetic images and lengths like those of LLaVA-1.5's 665K mixture."""

import io

import numpy as np
import PIL.Image

# Per source: rows (LLaVA#657, #702), mean rounds per row, median tokens per question and per answer. The rows are exact
# counts; rounds and tokens are rough estimates from reading samples.
SOURCES = {
    "LLaVA conversation": (56_681, 4.5, 16, 45),
    "LLaVA detail": (23_240, 1, 14, 130),
    "LLaVA reasoning": (77_791, 1, 22, 160),
    "VQAv2": (82_783, 5.4, 9, 2),
    "GQA": (72_140, 13, 11, 2),
    "OKVQA": (8_998, 1, 22, 2),
    "OCR-VQA": (80_000, 5, 10, 5),
    "A-OKVQA": (66_160, 1, 60, 2),
    "TextCaps": (21_953, 1, 60, 14),
    "RefCOCO": (48_447, 8, 18, 22),
    "VG": (86_417, 9, 14, 20),
    "ShareGPT": (40_688, 3, 60, 280),
}
_SYSTEM = 36  # tokens before the first round
_ROUND = 9  # tokens of each round in addition to question and answer
# Width and height in pixels with their weights: COCO and VG, larger ones of GQA and TextVQA, book covers.
_SIZES = {(640, 480): 40, (480, 640): 14, (640, 427): 14, (500, 375): 12, (800, 600): 6, (1024, 768): 6, (327, 500): 8}


def lengths(rows: int, image_tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws tokens and images of ``rows`` conversations, int [R] each; lengths are log-normal around the source's."""
    counts = np.array([count for count, *_ in SOURCES.values()])
    kinds = rng.choice(len(SOURCES), rows, p=counts / counts.sum())
    text_only = list(SOURCES).index("ShareGPT")
    totals = np.full(rows, _SYSTEM)
    for kind, (_, rounds, question, answer) in enumerate(SOURCES.values()):
        members = np.flatnonzero(kinds == kind)
        round_counts = rng.poisson(rounds - 1, len(members)) + 1
        spread = 0.9 if kind == text_only else 0.35
        round_tokens = (
            question * rng.lognormal(0, 0.3, len(members)) + answer * rng.lognormal(0, spread, len(members)) + _ROUND
        )
        totals[members] += (round_counts * round_tokens).astype(int)
    image_counts = (kinds != text_only).astype(np.int64)
    return np.minimum(totals + image_counts * image_tokens, 2048), image_counts


def jpegs(count: int, rng: np.random.Generator) -> list[bytes]:
    """Generates JPEG files of common sizes with the spectrum of photographs and, as in COCO, 150 KB at 640x480."""
    sizes = list(_SIZES)
    weights = np.array(list(_SIZES.values()), float)
    return [_jpeg(sizes[i], rng) for i in rng.choice(len(sizes), count, p=weights / weights.sum())]


def _jpeg(size: tuple[int, int], rng: np.random.Generator) -> bytes:
    width, height = size
    pixels = np.full((height, width, 3), 128.0)
    for octave in range(2, 10):
        cells = 2**octave
        noise = rng.integers(0, 256, (max(1, cells * height // width), cells, 3), dtype=np.uint8)
        layer = PIL.Image.fromarray(noise).resize(size, PIL.Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, np.float64) - 128) * 1.1 / octave
    file = io.BytesIO()
    PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()
