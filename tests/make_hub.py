"""Small data sets in the schemas of those on the Hub, written with pyarrow, and answers with lmms-eval's scores.

``evals/hub_cases.json`` has, for each benchmark, cases of a row (the columns that are read), an answer and a prompt,
and the scores of all answers. Prompts and scores are lmms-eval 0.7.3's, made once, with the rows of :func:`write_rows`:
each task's YAML file was loaded into a ``ConfigurableTask`` (model_name "llava") with the file as its data set.
``doc_to_text`` gave the prompts; the answers were set as the responses of one ``Instance`` per row; ``apply_filters``,
``process_results`` and ``aggregation()`` gave the scores.
"""

import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = pa.list_(pa.string())
SCHEMAS = {  # as the pages of the data sets show them
    "ai2d": [("question", pa.string()), ("options", TEXTS), ("answer", pa.string()), ("image", IMAGE)],
    "chartqa": [("type", pa.string()), ("question", pa.string()), ("answer", pa.string()), ("image", IMAGE)],
    "docvqa": [
        ("questionId", pa.string()),
        ("question", pa.string()),
        ("question_types", TEXTS),
        ("image", IMAGE),
        ("docId", pa.int64()),
        ("ucsf_document_id", pa.string()),
        ("ucsf_document_page_no", pa.string()),
        ("answers", TEXTS),
        ("data_split", pa.string()),
    ],
    "infovqa": [
        ("questionId", pa.string()),
        ("question", pa.string()),
        ("answers", TEXTS),
        ("answer_type", TEXTS),
        ("image", IMAGE),
        ("image_url", pa.string()),
        ("operation/reasoning", TEXTS),
        ("ocr", pa.string()),
        ("data_split", pa.string()),
    ],
    "mmstar": [
        ("index", pa.int64()),
        ("question", pa.string()),
        ("image", IMAGE),
        ("answer", pa.string()),
        ("category", pa.string()),
        ("l2_category", pa.string()),
        ("meta_info", pa.struct([("source", pa.string()), ("split", pa.string()), ("image_path", pa.string())])),
    ],
    "ocrbench": [
        ("dataset", pa.string()),
        ("question", pa.string()),
        ("question_type", pa.string()),
        ("answer", TEXTS),
        ("image", IMAGE),
    ],
    "seedbench": [
        ("answer", pa.string()),
        ("choice_a", pa.string()),
        ("choice_b", pa.string()),
        ("choice_c", pa.string()),
        ("choice_d", pa.string()),
        ("data_id", pa.string()),
        ("data_type", pa.string()),
        ("question", pa.string()),
        ("question_id", pa.string()),
        ("question_type_id", pa.int16()),
        ("image", pa.list_(IMAGE)),
        ("segment", pa.list_(pa.int64())),
    ],
    "textvqa_no_ocr": [
        ("image_id", pa.string()),
        ("question_id", pa.int32()),
        ("question", pa.string()),
        ("question_tokens", TEXTS),
        ("image", IMAGE),
        ("image_width", pa.int32()),
        ("image_height", pa.int32()),
        ("answers", TEXTS),
        ("image_classes", TEXTS),
        ("set_name", pa.string()),
        ("ocr_tokens", TEXTS),
    ],
}
FOLDERS = {name: f"{name}/data/test" for name in SCHEMAS} | {
    "docvqa": "docvqa/DocVQA/validation",
    "infovqa": "docvqa/InfographicVQA/validation",
    "docvqa_test": "docvqa/DocVQA/test",
    "infovqa_test": "docvqa/InfographicVQA/test",
    "mmstar": "mmstar/mmstar",
    "textvqa_no_ocr": "textvqa/data/validation",
}
CASES = json.loads((pathlib.Path(__file__).parent / "evals" / "hub_cases.json").read_text(encoding="utf-8"))


def make_image(number: int) -> bytes:
    """Returns a PNG file of 5 + ``number`` pixels in width, of one transparent color."""
    with io.BytesIO() as file:
        PIL.Image.new("RGBA", (5 + number, 4), (number, 0, 90, 0)).save(file, "PNG")
        return file.getvalue()


def make_rows(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a benchmark with their images."""
    rows = []
    for number, (row, *_) in enumerate(CASES[name.removesuffix("_test")]["cases"]):
        image = {"bytes": make_image(number), "path": None}
        rows.append(row | {"image": [image] if name == "seedbench" else image})
    if name == "seedbench":  # a video has several frames
        rows[2]["image"] *= 3
    if name.endswith("_test"):
        rows = [row | {"answers": None} for row in rows]
    return rows


def write_rows(
    folder: pathlib.Path,
    name: str,
    rows: Sequence[dict[str, Any]],
    shards: int = 1,
    drop: str = "",
    compression: str = "snappy",
) -> None:
    """Writes rows below ``folder`` where the data set has them, in groups of three."""
    stem = folder / FOLDERS[name]
    stem.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([field for field in SCHEMAS[name.removesuffix("_test")] if field[0] != drop])
    size = -(-len(rows) // shards)
    for shard in range(shards):
        file = stem.with_name(f"{stem.name}-{shard:05}-of-{shards:05}.parquet")
        if name == "mmstar":
            file = stem.with_suffix(".parquet")
        table = pa.Table.from_pylist(list(rows[shard * size : (shard + 1) * size]), schema)
        pq.write_table(table, file, row_group_size=3, compression=compression)


def write_authors_files(folder: pathlib.Path, name: str, changes: dict[str, Any] | None = None) -> list[pathlib.Path]:
    """Writes a benchmark's rows as its authors publish them, with images; returns the JSON files.

    ``changes``: of the keys of the second question.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions: dict[str, list[dict[str, Any]]] = {}
    for number, (row, *_) in enumerate(CASES[name.removesuffix("_test")]["cases"]):
        row, image = dict(row), f"{number}.png"
        match name.removesuffix("_test"):
            case "chartqa":
                file, images = f"test/{'_'.join(reversed(row['type'].split('_')))}.json", "test/png"
                row = {"imgname": image, "query": row["question"], "label": row["answer"]}
            case "docvqa":
                file, images = "test_v1.0.json" if name.endswith("_test") else "val_v1.0_withQT.json", "documents"
                row |= {"questionId": int(row["questionId"]), "image": f"documents/{image}"}
            case "infovqa":
                file = f"infographicsVQA_{'test_v1.0' if name.endswith('_test') else 'val_v1.0_withQT'}.json"
                row |= {"questionId": int(row["questionId"]), "image_local_name": image}
                images = "infographicsvqa_images"
            case "ocrbench":
                file, images = "OCRBench.json", "OCRBench_Images/IIIT5K"
                row = {
                    "dataset_name": row["dataset"],
                    "type": row["question_type"],
                    "id": number,
                    "question": row["question"],
                    "answers": row["answer"],
                    "image_path": f"IIIT5K/{image}",
                }
            case "seedbench":
                file, images, image = "SEED-Bench.json", "SEED-Bench-image", f"{number}_1"
                row |= {"data_id": image}
            case "textvqa_no_ocr":
                file, images, image = "TextVQA_0.5.1_val.json", "train_images", f"{number}a.jpg"
                row |= {"image_id": f"{number}a"}
        if name.endswith("_test"):
            row.pop("answers", None)
        (folder / images).mkdir(parents=True, exist_ok=True)
        (folder / images / image).write_bytes(make_image(number))
        questions.setdefault(file, []).append(row)
    next(iter(questions.values()))[1].update(changes or {})
    under = {"seedbench": "questions", "chartqa": "", "ocrbench": ""}.get(name, "data")
    for file, rows in questions.items():
        (folder / file).write_text(json.dumps({under: rows} if under else rows), encoding="utf-8")
    return [folder / file for file in questions]
