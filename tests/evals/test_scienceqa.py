"""ScienceQA: prompts, both sources of labels, answers parsed as LLaVA and lmms-eval do, inconsistent files."""

import json
import random

import PIL.Image
import pytest
from etils import epath
from lmms import load_task_module

from stf_jax.config import UserError
from stf_jax.evals.benchmarks.scienceqa import ScienceQA, parse_choice

LETTER = "\nAnswer with the option's letter from the given choices directly."
LIST = "Context: Two facts are known.\nA. whales swim\nB. bats fly\nC. ants crawl\nWhich is a fish?\nA. trout\nB. bat"
QUESTIONS = [  # id, image, text, gold
    ("11", "11/image.png", "What is the name of the colony shown?\nA. Maryland\nB. New Hampshire\nC. Vermont", "B"),
    ("4", None, "Context: Homer, The Iliad.\nWhich figure of speech is used?\nA. chiasmus\nB. apostrophe", "B"),
    ("15", None, LIST, "A"),
    ("42", "42/image.png", "What is the ratio?\nA. 0:4\nB. 4:0\nof all\nC. 2:2\nD. 1:3\nE. 3:1", "E"),
]
PROBLEMS = {
    "1": {"question": "of another split", "choices": ["yes", "no"], "answer": 0, "image": None},
    "42": {"question": "?", "choices": ["0:4", "4:0\nof all", "2:2", "1:3", "3:1"], "answer": 4, "image": "image.png"},
    "15": {"question": "?", "choices": ["trout", "bat"], "answer": 0, "image": None},
    "4": {"question": "?", "choices": ["chiasmus", "apostrophe"], "answer": 1, "image": None},
    "11": {"question": "?", "choices": ["Maryland", "New Hampshire", "Vermont"], "answer": 1, "image": "image.png"},
}


def _rows(questions=QUESTIONS):
    rows = []
    for identity, image, text, gold in questions:
        human = {"from": "human", "value": f"<image>\n{text}" if image else text}
        row = {"id": identity, "conversations": [human, {"from": "gpt", "value": gold}]}
        rows.append(row | ({"image": image} if image else {}))
    return rows


def _write(folder, rows, problems=None):
    folder.mkdir(exist_ok=True)
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    if problems is not None:
        (folder / "problems.json").write_text(json.dumps(problems))


@pytest.mark.parametrize("problems", [None, PROBLEMS])
def test_accuracy_by_hand(tmp_path, problems):
    _write(tmp_path / "scienceqa", _rows(), problems)
    benchmark = ScienceQA(epath.Path(tmp_path))
    name = "llava_test_CQM-A.json" if problems is None else "problems.json"
    assert benchmark.labels == (epath.Path(tmp_path) / "scienceqa" / name,)
    # Correct; correct; C for a question with two choices; wrong.
    texts = ["B", "B. apostrophe", "C", "A"]
    assert benchmark.metrics(texts) == {"accuracy": 0.5, "image_accuracy": 0.5}
    assert [score.value for score in benchmark.scores(texts)] == [1, 1, 0, 0]
    assert benchmark.metrics(["A", "B", "A", "The answer is E."]) == {"accuracy": 0.75, "image_accuracy": 0.5}
    benchmark.keep_first(1)
    assert benchmark.metrics(["B"]) == {"accuracy": 1.0, "image_accuracy": 1.0}


def test_without_images_there_is_no_image_accuracy(tmp_path):
    _write(tmp_path, _rows(QUESTIONS[1:3]))
    assert ScienceQA(epath.Path(tmp_path)).metrics(["B", "B"]) == {"accuracy": 0.5}


def test_prompts(tmp_path):
    _write(tmp_path, _rows())
    (tmp_path / "images" / "11").mkdir(parents=True)
    PIL.Image.new("RGB", (5, 3)).save(tmp_path / "images" / "11" / "image.png")
    with_image, text, *_ = ScienceQA(epath.Path(tmp_path)).questions
    assert (with_image.id, with_image.text) == ("11", QUESTIONS[0][2] + LETTER)
    assert with_image.prompt == f"<image>\n{QUESTIONS[0][2]}{LETTER}"
    assert with_image.image().size == (5, 3)
    assert (text.text, text.prompt, text.image) == (QUESTIONS[1][2] + LETTER, QUESTIONS[1][2] + LETTER, None)
    (tmp_path / "images" / "test" / "11").mkdir(parents=True)
    PIL.Image.new("RGB", (6, 3)).save(tmp_path / "images" / "test" / "11" / "image.png")
    assert ScienceQA(epath.Path(tmp_path)).questions[0].image().size == (6, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("E", "E"),
        ("a", None),
        ("", None),
        ("AB", None),
        ("A.", None),  # no space, and nothing after it
        ("B. bat", "B"),
        ("b. bat", None),
        ("F", None),  # LLaVA knows five letters
        ("The answer is B.", "B"),
        ("I think: The answer is B, or so", "B"),
        ("The answer is B", None),  # a character must follow
        ("The answer is B\n", None),
        ("The answer is A. The answer is B.", None),
        ("C. The answer is A.", "C"),  # the letter at the start takes precedence
    ],
)
def test_parse_choice_by_hand(text, expected):
    assert parse_choice(text) == expected


def _reference_parse_choice(text):
    """Implements the rule again, without regular expressions."""
    if text in list("ABCDE"):
        choice = text
    elif len(text) >= 3 and text[1] == "." and text[2] == " ":
        choice = text[0]
    else:
        choice, hits, start, lead = None, [], 0, "The answer is "
        while start < len(text):
            letter_start = start + len(lead)
            after = text[letter_start : letter_start + 2]
            if text.startswith(lead, start) and len(after) == 2 and "A" <= after[0] <= "Z" and after[1] != "\n":
                hits.append(after[0])
                start = letter_start + 2
            else:
                start += 1
        if len(hits) == 1:
            choice = hits[0]
    return choice if choice in list("ABCDE") else None


def test_parse_choice_matches_a_reimplementation():
    rng = random.Random(0)
    pieces = [*"ABCDEEFab", ".", *[". "] * 4, " ", "\n", *["The answer is "] * 4, "The answer is C."]
    choices = []
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 5)))
        choices.append(parse_choice(text))
        assert choices[-1] == _reference_parse_choice(text), text
    assert all(choices.count(letter) > 100 for letter in (*"ABCDE", None))


def test_accuracy_matches_lmms_eval(tmp_path):
    reference, rng = load_task_module("scienceqa/utils.py"), random.Random(1)
    questions, docs = [], []
    for n in range(3000):
        choices = [f"thing {m}" for m in range(rng.randint(2, 5))]
        docs.append({"choices": choices, "answer": rng.randrange(len(choices))})
        lines = "".join(f"\n{chr(65 + m)}. {choice}" for m, choice in enumerate(choices))
        questions.append((str(n), f"{n}.png" if n % 3 else None, f"Which?{lines}", chr(65 + docs[-1]["answer"])))
    _write(tmp_path, _rows(questions))
    texts = [rng.choice("ABCDE") + rng.choice(("", ". thing 1", ". The answer is B.")) for _ in questions]
    correct = [reference.sqa_process_results(doc, [text])["exact_match"] for doc, text in zip(docs, texts, strict=True)]
    with_image = [hit for hit, (_, image, _, _) in zip(correct, questions, strict=True) if image]
    assert ScienceQA(epath.Path(tmp_path)).metrics(texts) == {
        "accuracy": pytest.approx(sum(correct) / 3000, abs=1e-12),
        "image_accuracy": pytest.approx(sum(with_image) / 2000, abs=1e-12),
    }


def _open_error(folder):
    with pytest.raises(UserError) as error:
        ScienceQA(epath.Path(folder))
    return str(error.value)


def test_inconsistent_files_are_refused(tmp_path):
    _write(tmp_path, _rows(), PROBLEMS | {"4": PROBLEMS["4"] | {"answer": 0}})
    assert _open_error(tmp_path) == (
        f"{tmp_path}/problems.json, problem 4: its answer is A, but B in LLaVA's question file; the two files are of "
        "different versions."
    )


def test_answers_in_problems_json_suffice(tmp_path):
    rows = _rows()
    rows[0]["conversations"] = rows[0]["conversations"][:1]
    rows[1]["conversations"][1]["value"] = "The answer is B."
    _write(tmp_path, rows, PROBLEMS)
    assert ScienceQA(epath.Path(tmp_path)).metrics(["B", "B", "A", "E"])["accuracy"] == 1.0
    (tmp_path / "problems.json").unlink()
    assert _open_error(tmp_path) == (
        f"{tmp_path}/llava_test_CQM-A.json, question 11: gpt's answer is not the letter of one of its choices; put "
        "ScienceQA's problems.json into the same folder."
    )


@pytest.mark.parametrize("text", ["Which?\nA. trout\nB. bat", "Which, trout or bat?", "Which?\nA. trout\nC. bat", LIST])
def test_an_answer_beyond_the_choices_is_refused(tmp_path, text):
    _write(tmp_path, _rows([("15", None, text, "C")]))
    assert "question 15: gpt's answer is not the letter of one of its choices" in _open_error(tmp_path)


def test_every_question_needs_its_problem(tmp_path):
    _write(tmp_path, _rows(), {key: value for key, value in PROBLEMS.items() if key not in ("4", "15")})
    assert "problems.json lacks 2 of the 4 questions, such as '4'" in _open_error(tmp_path)


@pytest.mark.parametrize(
    "problem",
    [
        None,
        {},
        {"choices": ["yes", "no"]},
        {"choices": ["yes", "no"], "answer": 2},
        {"choices": ["yes", "no"], "answer": -1},
        {"choices": ["yes", "no"], "answer": True},
        {"choices": ["yes", "no"], "answer": "1"},
        {"choices": "yes", "answer": 1},
        {"choices": 2, "answer": 1},
    ],
)
def test_malformed_problems_are_refused(tmp_path, problem):
    _write(tmp_path, _rows(), PROBLEMS | {"4": problem})
    assert _open_error(tmp_path) == (
        f"{tmp_path}/problems.json, problem 4: it needs choices, and answer, the index of one of them."
    )


def test_problems_are_an_object(tmp_path):
    _write(tmp_path, _rows(), list(PROBLEMS.values()))
    assert _open_error(tmp_path) == (
        f"{tmp_path}/problems.json is not a JSON object keyed by problem id; use ScienceQA's own file."
    )


@pytest.mark.parametrize("rows", [[], {}, {"questions": []}])
def test_questions_are_a_list(tmp_path, rows):
    _write(tmp_path, rows)
    assert _open_error(tmp_path) == (
        f"{tmp_path}/llava_test_CQM-A.json is not a list of questions; use the one in LLaVA's evaluation files."
    )


HUMAN = {"from": "human", "value": "Which?"}


@pytest.mark.parametrize(
    "row",
    [
        None,
        ["id"],
        {"conversations": [HUMAN]},
        {"id": 1.5, "conversations": [HUMAN]},
        {"id": "1"},
        {"id": "1", "conversations": []},
        {"id": "1", "conversations": {"from": "human"}},
        {"id": "1", "conversations": ["human"]},
        {"id": "1", "conversations": [{"from": "human"}]},
        {"id": "1", "conversations": [HUMAN | {"from": "gpt"}]},
        {"id": "1", "conversations": [HUMAN | {"value": 1}]},
        {"id": "1", "conversations": [HUMAN, {"from": "gpt", "value": 1}]},
    ],
)
def test_malformed_questions_are_refused(tmp_path, row):
    _write(tmp_path, [*_rows(), row])
    assert _open_error(tmp_path) == (
        f"{tmp_path}/llava_test_CQM-A.json, question 5: it needs id and conversations that start with a human turn."
    )


def test_null_means_no_image(tmp_path):
    _write(tmp_path, [{"image": None} | row for row in _rows()])
    questions = ScienceQA(epath.Path(tmp_path)).questions
    assert [question.image is not None for question in questions] == [True, False, False, True]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"id": "1", "conversations": [HUMAN], "image": 1}, "image must be the name of a file, or null."),
        (
            {"id": "1", "conversations": [HUMAN | {"value": "<image>\nWhich?"}], "image": None},
            "it contains <image>, but names no image.",
        ),
    ],
)
def test_invalid_image_names_are_refused(tmp_path, row, sentence):
    _write(tmp_path, [*_rows(), row])
    assert _open_error(tmp_path) == f"{tmp_path}/llava_test_CQM-A.json, question 5: {sentence}"
