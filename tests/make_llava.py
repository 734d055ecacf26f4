"""Makes a small data set in LLaVA's exact schema: ``python -m tests.make_llava DIR``.

Photographs are those that the packages scikit-image and scikit-learn carry (requirements-data.txt), the rest are scenes
(stf_jax/data/scenes.py). Under DIR stand, as in LLaVA's own data:

  blip_laion_cc_sbu_558k.json   captions, for stage 1      pretrain_images/00453/004539375.jpg …
  llava_v1_5_mix665k.json       conversations, for stage 2  images/{coco/train2017,gqa/images,ocr_vqa/images,…}/…

with the sets' known faults among them: GIFs named .jpg, images that are missing, empty or cut short, rows of text
alone, rows over length, template strings inside texts.
"""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import PIL.Image

from stf_jax.data.records import Record
from stf_jax.data.scene_records import SceneRecords

ASK = (
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


def photographs() -> list[tuple[PIL.Image.Image, str]]:
    """Photographs with a caption each, of the packages that are installed."""
    found = []
    for path, caption in PHOTOS.items():
        package, rest = path.split("/", 1)
        spec = importlib.util.find_spec(package)  # found, not imported: only its files are wanted
        if spec is not None:
            with PIL.Image.open(pathlib.Path(spec.submodule_search_locations[0]) / rest) as image:
                found.append((image.convert("RGB"), caption))
    return found


def make(folder: pathlib.Path, captions: int = 192, conversations: int = 192, seed: int = 0) -> dict[str, int]:
    """Writes both sets, so many good rows each; returns how many bad rows of each reason the second has."""
    rng, photos = np.random.default_rng(seed), photographs()
    _captions(folder, captions, photos, rng)
    return _conversations(folder, conversations, photos, rng)


def _captions(folder, count, photos, rng):
    scenes, rows = SceneRecords("captions", count, seed=3, max_things=2), []
    for i in range(count):
        image, caption = photos[i // 4] if i % 4 == 0 and i // 4 < len(photos) else _scene(scenes[i])
        identity = f"{4539375 + 7 * i:09}"
        name = f"{identity[:5]}/{identity}.jpg"
        _save(image, folder / "pretrain_images" / name)
        ask = ASK[rng.integers(len(ASK))]
        question = f"{ask}\n<image>" if rng.random() < 0.5 else f"<image>\n{ask}"
        rows.append({"id": identity, "image": name, "conversations": _talk(question, caption)})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))


def _scene(record: Record):
    return record.images[0](), record.turns[-1].text


def _conversations(folder, count, photos, rng):
    scenes, rows, images = SceneRecords("conversations", count, seed=4, max_things=2), [], folder / "images"
    places = ("coco/train2017/{:012}.jpg", "gqa/images/{}.jpg", "vg/VG_100K/{}.jpg", "textvqa/train_images/{}.jpg")
    for i in range(count):
        if i % 16 == 15:  # ShareGPT's, of text alone
            answer = "A row of text alone, which quotes </s> and USER: as text. " * (1 + i % 3)
            rows.append({"id": f"wgByO4Y_{i}", "model": "", "conversations": _talk("Write something.", answer)})
        elif i % 8 == 3:  # OCR-VQA's: GIFs whose name says .jpg
            image, caption = photos[i % len(photos)] if photos else _scene(scenes[i])
            name = f"ocr_vqa/images/14003199{i}X.jpg"
            _save(image, images / name, "GIF")
            rows.append({"id": f"14003199{i}X", "image": name, "conversations": _talk("<image>\nWhat?", caption)})
        else:
            record, name = scenes[i], places[i % len(places)].format(33471 + i)
            _save(record.images[0](), images / name)
            talk = [{"from": turn.speaker, "value": turn.text} for turn in record.turns]
            rows.append({"id": f"{33471 + i:012}", "image": name, "conversations": talk})
    rows += [_faulty(images, kind, i) for i, kind in enumerate(FAULTS)]
    rows.append({"id": "long", "conversations": _talk("Go on.", "and on " * 20_000)})
    rows = [rows[i] for i in rng.permutation(len(rows))]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    reasons = [{"empty": "corrupt"}.get(kind, kind) for kind in FAULTS] + ["over_length"]
    return {reason: reasons.count(reason) for reason in reasons}


def _faulty(images, kind, number):
    name, talk = f"vg/VG_100K_2/{number}.jpg", _talk("<image>\nWhat is this?", "A thing.")
    row = {"id": f"bad-{kind}", "image": name, "conversations": talk}
    if kind != "missing":
        _save(PIL.Image.effect_noise((320, 240), 60), images / name)
    if kind == "empty":
        (images / name).write_bytes(b"")
    elif kind == "truncated":
        (images / name).write_bytes((images / name).read_bytes()[:5000])
    elif kind == "mark_without_image":
        del row["image"]
    elif kind == "image_without_mark":
        talk[0]["value"] = "What is this?"
    elif kind == "roles":
        talk.insert(1, dict(talk[0]))
    elif kind == "empty_answer":
        talk[1]["value"] = " \n"
    return row


def _talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _save(image, path, kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(pathlib.Path(sys.argv[1]))
