"""MMBench and MMBench-CN: prompts, answers parsed as lmms-eval does, scores by hand, the workbook, bad tables."""

import base64
import csv
import io
import json
import random

import openpyxl
import PIL.Image
import pytest
from etils import epath
from lmms import load_task_module

from stf_jax.config import UserError
from stf_jax.data.records import BadRow
from stf_jax.evals.benchmarks.mmbench import MMBench, MMBenchCN, parse_choice

LETTER = "\nAnswer with the option's letter from the given choices directly."
COLUMNS = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "comment"]
ROWS = [  # index, question, hint, A, B, C, D, answer, category, l2-category
    (241, 'Which "is"\ttrue?', "The passage:\r\nbirds.", "cat", "dog", "a bird", "fish", "B", "ocr", "fine"),
    (252, "Red?", "nan", "yes", "no", "", "", "A", "color", "fine"),
    (1000241, 'Which "is"\ttrue?', "The passage:\r\nbirds.", "fish", "cat", "dog", "a bird", "C", "ocr", "fine"),
    (1000252, "Red?", "", "no", "yes", "nan", "", "B", "color", "fine"),
    (7, "How many?", "", "1", "2", "None", "4", "A", "ocr", "logic"),
    (2000241, 'Which "is"\ttrue?', "The passage:\r\nbirds.", "a bird", "fish", "cat", "dog", "D", "ocr", "fine"),
]


def _image(color):
    with io.BytesIO() as file:
        PIL.Image.new("RGB", (4, 3), color).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def _write(file, rows=ROWS, drop=(), **changed):
    """Writes a table as pandas does: with quotes only where needed."""
    columns = [column for column in (*COLUMNS, "split") if column not in drop]
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        table.writeheader()
        for number, (index, question, hint, a, b, c, d, answer, category, l2_category) in enumerate(rows):
            row = {"index": index, "question": question, "hint": hint, "A": a, "B": b, "C": c, "D": d}
            row |= {"answer": answer, "category": category, "l2-category": l2_category, "split": "dev"}
            table.writerow(row | {"image": _image((number, 0, 0)), "source": "s", "comment": ""} | changed)


DEV = "mmbench_dev_20230712.tsv"


def test_prompts(tmp_path):
    _write(tmp_path / "mmbench" / DEV)
    benchmark = MMBench(epath.Path(tmp_path))
    first, second, *_, seventh, _ = benchmark.questions
    assert benchmark.max_new_tokens == 1024
    assert (first.id, first.text) == (241, first.prompt + LETTER)
    assert first.prompt == 'The passage:\r\nbirds.\nWhich "is"\ttrue?\nA. cat\nB. dog\nC. a bird\nD. fish'
    assert second.prompt == "Red?\nA. yes\nB. no"
    assert seventh.prompt == "How many?\nA. 1\nB. 2"  # as in LLaVA: options up to the first missing one
    assert second.image().getpixel((0, 0)) == (1, 0, 0)


def test_mmbench_in_chinese(tmp_path):
    _write(
        tmp_path / "mmbench" / "mmbench_dev_cn_20231003.tsv", [(3, "红色吗?", "", "是", "不", "", "", "A", "c", "l")]
    )
    benchmark = MMBenchCN(epath.Path(tmp_path))
    assert benchmark.questions[0].prompt == "红色吗?\nA. 是\nB. 不"
    assert benchmark.questions[0].text == "红色吗?\nA. 是\nB. 不\n请直接回答选项字母。"
    assert benchmark.metrics(["是"])["circular_accuracy"] == 1.0
    assert benchmark.write_submission(["是"], epath.Path(tmp_path)) == [
        epath.Path(tmp_path) / "mmbench_cn_submission.xlsx"
    ]
    assert openpyxl.load_workbook(tmp_path / "mmbench_cn_submission.xlsx").active["G2"].value == "是"
    with pytest.raises(UserError, match=r"there is no mmbench_dev_20230712\.tsv or mmbench_test_20230712\.tsv or "):
        MMBench(epath.Path(tmp_path))


def test_scores_by_hand(tmp_path):
    _write(tmp_path / DEV)
    benchmark = MMBench(epath.Path(tmp_path))
    assert benchmark.labels == (epath.Path(tmp_path) / DEV,)
    # 241: correct in its three rows. 252: correct only in its original order. 7: wrong.
    texts = ["B", "A.", "It is a dog", "A", "3", "D"]
    metrics = benchmark.metrics(texts)
    scores = {benchmark.questions[score.asked[0]].id: score for score in benchmark.scores(texts)}
    assert {index: score.value for index, score in scores.items()} == {241: 1.0, 252: 0.0, 7: 0.0}
    assert [benchmark.questions[index].id % 1_000_000 for index in scores[241].asked] == [241] * 3
    assert sorted(index for score in scores.values() for index in score.asked) == list(range(6))
    ocr = {"circular_accuracy": 1 / 2, "vanilla_accuracy": 1 / 2, "questions": 2}
    color = {"circular_accuracy": 0.0, "vanilla_accuracy": 1.0, "questions": 1}
    fine = {"circular_accuracy": 1 / 2, "vanilla_accuracy": 1.0, "questions": 2}
    logic = {"circular_accuracy": 0.0, "vanilla_accuracy": 0.0, "questions": 1}
    assert metrics == {
        "circular_accuracy": pytest.approx(1 / 3),
        "vanilla_accuracy": pytest.approx(2 / 3),
        "by_category": {"color": color, "ocr": ocr},
        "by_l2_category": {"fine": fine, "logic": logic},
    }
    json.dumps(metrics)
    # A question is wrong if any of its rotations is.
    for wrong in (0, 2, 5):
        texts = ["B", "A", "C", "B", "A", "D"]
        texts[wrong] = "none"
        metrics = benchmark.metrics(texts)
        assert metrics["circular_accuracy"] == pytest.approx(2 / 3)
        assert metrics["vanilla_accuracy"] == pytest.approx(1.0 if wrong else 2 / 3)


def test_optional_columns_may_be_missing(tmp_path):
    drop = ("hint", "C", "D", "category", "l2-category", "comment", "source", "split")
    _write(tmp_path / DEV, [ROWS[0], ROWS[1], ROWS[3]], drop)
    benchmark = MMBench(epath.Path(tmp_path))
    assert benchmark.questions[0].prompt == 'Which "is"\ttrue?\nA. cat\nB. dog'
    assert benchmark.metrics(["B"] * 3) == {"circular_accuracy": 0.5, "vanilla_accuracy": 0.5}
    _write(tmp_path / DEV, drop=drop)  # some gold answers are C or D
    assert _open_error(tmp_path) == (
        f"{tmp_path / DEV}, row 3: the answer is C, but that option is empty; use MMBench's own file."
    )


def test_keep_first_keeps_all_rotations(tmp_path):
    _write(tmp_path / DEV)
    benchmark = MMBench(epath.Path(tmp_path))
    benchmark.keep_first(1)
    assert [question.id for question in benchmark.questions] == [241, 1000241, 2000241]
    ocr = {"circular_accuracy": 0.0, "vanilla_accuracy": 1.0}
    assert benchmark.metrics(["B", "C", "A"]) == {
        **ocr,
        "by_category": {"ocr": ocr | {"questions": 1}},
        "by_l2_category": {"fine": ocr | {"questions": 1}},
    }


def test_the_workbook_of_a_test_split(tmp_path):
    _write(tmp_path / "mmbench_test_20230712.tsv", drop=("answer",))
    benchmark = MMBench(epath.Path(tmp_path))
    assert benchmark.labels == ()
    texts = ["B", "=1+1", "#N/A", "a\x07b\nc", "", "D. dog"]
    (file,) = benchmark.write_submission(texts, epath.Path(tmp_path))
    assert file == epath.Path(tmp_path) / "mmbench_submission.xlsx"
    head, *rows = openpyxl.load_workbook(file).active.iter_rows()
    assert [cell.value for cell in head] == ["index", "question", "A", "B", "C", "D", "prediction", "split"]
    assert [cell.value for cell in rows[1]] == [252, "Red?", "yes", "no", None, None, "=1+1", "dev"]
    assert not {row[6].data_type for row in rows} & {"f", "e"}  # no formula, no error
    assert [row[6].value for row in rows] == ["B", "=1+1", "#N/A", "ab\nc", None, "D. dog"]
    assert [row[0].value for row in rows] == [row[0] for row in ROWS]
    assert [path.name for path in tmp_path.glob("*.xlsx")] == ["mmbench_submission.xlsx"]


def test_the_workbook_of_a_dev_split(tmp_path):
    _write(tmp_path / DEV)
    benchmark = MMBench(epath.Path(tmp_path))
    benchmark.keep_first(2)
    (file,) = benchmark.write_submission(["B", "A", "C", "B", "D"], epath.Path(tmp_path))
    head, *rows = openpyxl.load_workbook(file).active.iter_rows(values_only=True)
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[3] == (1000252, "Red?", "no", "yes", None, None, "B", "B", "dev")
    assert len(rows) == 5


def test_a_test_split_may_have_an_empty_column_of_answers(tmp_path):
    _write(tmp_path / "mmbench_test_20230712.tsv", answer="nan")
    assert MMBench(epath.Path(tmp_path)).labels == ()


OPTIONS = {"A": "Cat", "B": "a dog", "C": "cart", "D": "Fish"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b", None),
        ("B. a dog", "B"),
        ("(C)", "C"),
        ("answer :D.", "D"),
        ("A", "A"),
        ("A cat", "A"),
        ("A big fat fish", "D"),  # A is an article where there are more than three words
        ("A big fat cow", None),
        ("A. B", "B"),  # a bare letter comes first
        ("A B", None),
        ("A B: cart", "A"),
        ("A or B: cart", "B"),
        ("E", "E"),  # never the gold answer
        ("E. fish", "E"),
        ("FISH!", "D"),
        ("cat and fish", None),
        ("[B]", None),
        ("", None),
    ],
)
def test_parse_choice_by_hand(text, expected):
    assert parse_choice(text, OPTIONS) == expected


def test_parse_choice_matches_lmms_eval():
    reference, rng = load_task_module("mmbench/mmbench_evals.py").MMBench_Evaluator(), random.Random(0)
    marks = ["", "", "", ".", ",", ":", ")", ").", "]", "!"]
    words = ["a", "dog", "cat", "Fish", "cart", "is", "the", "answer", "\n", "红", "option"]
    results = []
    for _ in range(20_000):
        parts = [
            rng.choice(["", "", "", "(", ":", "["]) + rng.choice("ABCDEFab") + rng.choice(marks)
            if rng.random() < 0.4
            else rng.choice(words)
            for _ in range(rng.randint(0, 6))
        ]
        text = rng.choice([" ", "  ", "\n"]).join(parts)
        options = dict(list(OPTIONS.items())[: rng.randint(2, 4)])
        results.append(parse_choice(text, options))
        assert results[-1] == (reference.can_infer(text, dict(options)) or None), (text, options)
    assert all(results.count(letter) > 500 for letter in (*"ABCDE", None))


# ---- Images ----------------------------------------------------------------------------------------------------------


def _write_references(file, cells):
    """Writes a table of six rows, some with another row's index in place of their image."""
    _write(file)
    rows = list(csv.DictReader(file.open(newline=""), delimiter="\t"))
    for row in rows:
        row["image"] = cells.get(int(row["index"]), row["image"])
    with file.open("w", newline="") as opened:
        table = csv.DictWriter(opened, rows[0], delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


@pytest.mark.parametrize("name", [DEV, "MMBench_DEV_EN.tsv"])
def test_image_references_as_vlmevalkit_writes_them(tmp_path, name):
    # Backward, forward, and chained references; two rows with images: 241 has the color 0, 7 the color 4.
    _write_references(tmp_path / name, {1000241: "241", 252: "7", 1000252: "252", 2000241: "1000252"})
    benchmark = MMBench(epath.Path(tmp_path))
    reds = {question.id: question.image().getpixel((0, 0))[0] for question in benchmark.questions}
    assert reds == {241: 0, 252: 4, 1000241: 0, 1000252: 4, 7: 4, 2000241: 4}
    benchmark.check_images()
    # Questions within a limit may refer to rows beyond it.
    benchmark.keep_first(2)
    assert 7 not in {question.id for question in benchmark.questions}
    benchmark.check_images()


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ({1000241: "242"}, ", index 1000241: its image refers to index 242, which does not exist."),
        ({252: "7", 7: "8"}, ", index 7: its image refers to index 8, which does not exist."),
        ({7: "7"}, ", index 7: its image refers to itself, directly or through other rows."),
        (
            {241: "252", 252: "7", 7: "252"},
            ", index 252: its image refers to itself, directly or through other rows.",
        ),
        ({7: ""}, ", row 5 has no image; use MMBench's own file."),
    ],
)
def test_broken_image_references_are_refused(tmp_path, cells, sentence):
    _write_references(tmp_path / DEV, cells)
    assert _open_error(tmp_path) == f"{tmp_path / DEV}{sentence}"


def test_check_images_opens_every_image(tmp_path):
    broken = base64.b64encode(base64.b64decode(_image("red"))[:45]).decode()
    _write_references(tmp_path / DEV, {1000241: "241", 252: "abc", 7: broken, 2000241: "241"})
    benchmark = MMBench(epath.Path(tmp_path))  # enough to score answers
    with pytest.raises(UserError) as error:
        benchmark.check_images()
    assert str(error.value).startswith(
        f"mmbench: 2 of 4 images cannot be used. The first: Image of index 252 in {tmp_path / DEV} "
    )
    benchmark.limit(2)
    with pytest.raises(UserError, match="1 of 3 images cannot be used"):
        benchmark.check_images()


# ---- Bad tables ------------------------------------------------------------------------------------------------------


def _open_error(folder):
    with pytest.raises(UserError) as error:
        MMBench(epath.Path(folder))
    return str(error.value)


def test_images_that_are_not_images(tmp_path):
    valid, text = _image("red"), base64.b64encode(b"no image").decode()
    for image in ("abc", "abc!", text, f"['{valid}', '{valid}']", f"data:image/png;base64,{valid}"):
        _write(tmp_path / DEV, image=image)
        with pytest.raises(BadRow, match="Image of index 241 ") as error:
            MMBench(epath.Path(tmp_path)).questions[0].image()
        assert error.value.reason == "corrupt"


def test_large_images_fit_into_a_field(tmp_path):
    _write(tmp_path / DEV, image=_image("red") + "=" * 200_000)  # csv's default limit is 131,072 characters
    assert MMBench(epath.Path(tmp_path)).questions[0].image().size == (4, 3)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([ROWS[0], ROWS[0]], ", row 2: another row also has index 241."),
        ([ROWS[0], ROWS[3]], ": index 1000252 is a rotation of 252, which does not exist."),
        ([ROWS[0], ("2.5", *ROWS[1][1:])], ", row 2: index '2.5' is not an integer of at most 18 digits."),
        ([("-1", *ROWS[1][1:])], ", row 1: index '-1' is not an integer of at most 18 digits."),
        ([("", *ROWS[1][1:])], ", row 1 has no index; use MMBench's own file."),
        ([(5, "nan", *ROWS[1][2:])], ", row 1 has no question; use MMBench's own file."),
        ([ROWS[0], (*ROWS[1][:7], "E", "c", "l")], ", index 252: the answer is 'E', not one of A, B, C, D."),
        ([ROWS[0], (*ROWS[1][:7], "AB", "c", "l")], ", index 252: the answer is 'AB', not one of A, B, C, D."),
        ([ROWS[0], (*ROWS[1][:7], "", "c", "l")], ", index 252: the answer is None, not one of A, B, C, D."),
        (
            [(*ROWS[1][:7], "", "c", "l")],
            " has no answers, but the dev split has them: download it again. If this is the test split, ",
        ),
        (
            [ROWS[0], (*ROWS[1][:7], "C", "c", "l")],
            ", row 2: the answer is C, but that option is empty; use MMBench's own file.",
        ),
        ([ROWS[0], (*ROWS[1][:4], "nan", *ROWS[1][5:])], ", row 2 has no B; use MMBench's own file."),
        ([ROWS[0], (*ROWS[1][:3], " ", *ROWS[1][4:])], ", row 2 has no A; use MMBench's own file."),
        ([], " is not a table of questions with index, question, A, B and image; use MMBench's own file."),
    ],
)
def test_bad_rows_are_refused(tmp_path, rows, sentence):
    file = tmp_path / DEV
    _write(file, rows)
    assert _open_error(tmp_path).startswith(f"{file}{sentence}")


def test_an_option_may_be_the_word_none(tmp_path):
    _write(tmp_path / DEV, [(5, "Which?", "", "None", "one", "", "", "A", "c", "l")])
    assert MMBench(epath.Path(tmp_path)).questions[0].prompt == "Which?"  # as in LLaVA, which takes it as missing


@pytest.mark.parametrize("column", ["index", "question", "A", "B", "image"])
def test_required_columns(tmp_path, column):
    _write(tmp_path / DEV, drop=(column,))
    assert _open_error(tmp_path) == (
        f"{tmp_path / DEV} is not a table of questions with index, question, A, B and image (it has no {column}); use "
        "MMBench's own file."
    )


def test_a_repeated_column_is_refused(tmp_path):
    file = tmp_path / DEV
    _write(file)
    file.write_text(file.read_text().replace("\thint\t", "\tquestion\t", 1))
    assert _open_error(tmp_path) == f"{file} has two columns named 'question'; use MMBench's own file."


def test_a_dev_table_needs_answers(tmp_path):
    _write(tmp_path / DEV, drop=("answer",))
    assert _open_error(tmp_path).endswith("If this is the test split, name it MMBench_TEST_EN.tsv.")


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / DEV
    _write(file)
    file.write_text(file.read_text()[:-60])
    assert _open_error(tmp_path) == f"{file}, row 6 does not have the header's columns; download the file again."


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / DEV).write_bytes(b"index\tquestion\n\xff\xfe\t\n")
    assert _open_error(tmp_path).startswith(f"{tmp_path / DEV} cannot be read as tab-separated values: ")
