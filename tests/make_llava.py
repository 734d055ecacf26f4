"""Makes a small data set in LLaVA's exact schema: ``python -m tests.make_llava DIR``.

Photos come from the packages scikit-image and scikit-learn (requirements-data.txt); the rest are scenes
(stf_jax/data/scenes.py). DIR has the layout of LLaVA's own data:

  blip_laion_cc_sbu_558k.json   captions, for stage 1      pretrain_images/00453/004539375.jpg …
  llava_v1_5_mix665k.json       conversations, for stage 2  images/{coco/train2017,gqa/images,ocr_vqa/images,…}/…

with the known faults of those sets: GIFs named .jpg, missing, empty or truncated images, text-only rows, rows that are
too long, and template strings in texts.
"""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import PIL.Image

from stf_jax.data.records import Record
from stf_jax.data.sources.scenes import SceneRecords

INSTRUCTIONS = (
    "Render a clear and concise summary of the photo.",
    "What is in this photo?",
    "Give a short and clear explanation of the subsequent image.",
)
PHOTOS = {
    "skimage/data/astronaut.png": "an astronaut in an orange suit smiles before a flag",
    "skimage/data/camera.png": "a man in a dark coat looks through a camera on a tripod",
    "skimage/data/chelsea.png": "the face of a tabby cat",
    "skimage/data/coffee.png": "a cup of coffee with a spoon on a saucer",
    "skimage/data/coins.png": "rows of old coins",
    "skimage/data/horse.png": "the black outline of a horse",
    "skimage/data/hubble_deep_field.jpg": "many galaxies in a dark sky",
    "skimage/data/motorcycle_left.png": "a motorcycle in a garage",
    "skimage/data/page.png": "a page of a book",
    "skimage/data/rocket.jpg": "a rocket on its launch pad",
    "skimage/data/text.png": "handwritten words",
    "sklearn/datasets/images/china.jpg": "a palace with a curved roof before the sky",
    "sklearn/datasets/images/flower.jpg": "an orange flower",
}
FAULTS = ("missing", "empty", "truncated", "mark_without_image", "image_without_mark", "roles", "empty_answer")


def load_photos() -> list[tuple[PIL.Image.Image, str]]:
    """Loads the photos of those packages that are installed, with captions."""
    photos = []
    for path, caption in PHOTOS.items():
        package, rest = path.split("/", 1)
        spec = importlib.util.find_spec(package)  # not imported: only its files are needed
        if spec is not None:
            with PIL.Image.open(pathlib.Path(spec.submodule_search_locations[0]) / rest) as image:
                photos.append((image.convert("RGB"), caption))
    return photos


def make(folder: pathlib.Path, captions: int = 192, conversations: int = 192, seed: int = 0) -> dict[str, int]:
    """Writes both sets with the given numbers of good rows; returns the second set's number of bad rows per reason."""
    rng, photos = np.random.default_rng(seed), load_photos()
    _write_captions(folder, captions, photos, rng)
    return _write_conversations(folder, conversations, photos, rng)


def _write_captions(folder, count, photos, rng):
    scenes, rows = SceneRecords("captions", count, seed=3, max_things=2), []
    for i in range(count):
        image, caption = photos[i // 4] if i % 4 == 0 and i // 4 < len(photos) else _draw(scenes[i])
        row_id = f"{4539375 + 7 * i:09}"
        name = f"{row_id[:5]}/{row_id}.jpg"
        _save(image, folder / "pretrain_images" / name)
        instruction = INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))]
        question = f"{instruction}\n<image>" if rng.random() < 0.5 else f"<image>\n{instruction}"
        rows.append({"id": row_id, "image": name, "conversations": _make_turns(question, caption)})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))


def _draw(record: Record):
    return record.images[0](), record.turns[-1].text


def _write_conversations(folder, count, photos, rng):
    scenes, rows, images = SceneRecords("conversations", count, seed=4, max_things=2), [], folder / "images"
    paths = ("coco/train2017/{:012}.jpg", "gqa/images/{}.jpg", "vg/VG_100K/{}.jpg", "textvqa/train_images/{}.jpg")
    for i in range(count):
        if i % 16 == 15:  # ShareGPT: text-only
            answer = "A row of text alone, which quotes </s> and USER: as text. " * (1 + i % 3)
            rows.append({"id": f"wgByO4Y_{i}", "model": "", "conversations": _make_turns("Write something.", answer)})
        elif i % 8 == 3:  # OCR-VQA: GIFs named .jpg
            image, caption = photos[i % len(photos)] if photos else _draw(scenes[i])
            name = f"ocr_vqa/images/14003199{i}X.jpg"
            _save(image, images / name, "GIF")
            rows.append({"id": f"14003199{i}X", "image": name, "conversations": _make_turns("<image>\nWhat?", caption)})
        else:
            record, name = scenes[i], paths[i % len(paths)].format(33471 + i)
            _save(record.images[0](), images / name)
            turns = [{"from": turn.speaker, "value": turn.text} for turn in record.turns]
            rows.append({"id": f"{33471 + i:012}", "image": name, "conversations": turns})
    rows += [_make_bad_row(images, kind, i) for i, kind in enumerate(FAULTS)]
    rows.append({"id": "long", "conversations": _make_turns("Go on.", "and on " * 20_000)})
    rows = [rows[i] for i in rng.permutation(len(rows))]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    reasons = [{"empty": "corrupt"}.get(kind, kind) for kind in FAULTS] + ["over_length"]
    return {reason: reasons.count(reason) for reason in reasons}


def _make_bad_row(images, kind, number):
    name, turns = f"vg/VG_100K_2/{number}.jpg", _make_turns("<image>\nWhat is this?", "A thing.")
    row = {"id": f"bad-{kind}", "image": name, "conversations": turns}
    if kind != "missing":
        _save(PIL.Image.effect_noise((320, 240), 60), images / name)
    if kind == "empty":
        (images / name).write_bytes(b"")
    elif kind == "truncated":
        (images / name).write_bytes((images / name).read_bytes()[:5000])
    elif kind == "mark_without_image":
        del row["image"]
    elif kind == "image_without_mark":
        turns[0]["value"] = "What is this?"
    elif kind == "roles":
        turns.insert(1, dict(turns[0]))
    elif kind == "empty_answer":
        turns[1]["value"] = " \n"
    return row


def _make_turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _save(image, path, kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(pathlib.Path(sys.argv[1]))
