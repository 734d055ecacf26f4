"""MME: labels in its release and tool, answers parsed as its own program does, scores by hand and against lmms-eval."""

import json
import random

import PIL.Image
import pytest
from etils import epath
from lmms import load_task_module

from stf_jax.config import UserError
from stf_jax.evals.benchmarks.mme import MME, parse_yes_no

WORD = "\nAnswer the question using a single word or phrase."
QUESTIONS = [  # image, question, gold; the two questions of an image are not adjacent
    ("existence/a.b.jpg", "Is there a dog?", "Yes"),
    ("code_reasoning/0020.png", "Is the output '1'?", "Yes"),
    ("existence/a.b.jpg", "Is there a cat?", "No"),
    ("code_reasoning/0020.png", "Is the output '7'?", "No"),
    ("existence/000000006040.jpg", "Is there a dog?", "No"),
    ("existence/000000006040.jpg", "Is there a tie?", "Yes"),
]
RELEASE = "MME_Benchmark_release_version"


def _write(folder, questions=QUESTIONS, labels="{release}/{task}/questions_answers_YN/{stem}.txt"):
    rows = [
        {"question_id": name, "image": name, "text": text + WORD, "category": name.split("/")[0]}
        for name, text, _ in questions
    ]
    folder.mkdir(exist_ok=True)
    (folder / "llava_mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, (name, text, gold) in enumerate(questions[::-1]):
        task, image = name.split("/")
        file = folder / labels.format(release=RELEASE, task=task, stem=image[:-4])
        file.parent.mkdir(parents=True, exist_ok=True)
        question = f"{text}{' ' * (1 + number % 2)}Please answer yes or no."
        with file.open("a") as opened:
            opened.write(f"{image}\t{question}\t{gold}\tYes\n" if "eval_tool" in labels else f"{question}\t{gold}\n")


TEXTS = ["Yes", "yes.", "No", "No, it is 7", "no", "No"]  # all correct but the last


def _expected_metrics():
    # existence: 3 of 4 questions, 1 of 2 images: 75 + 50. code_reasoning: all correct correct.
    existence = {"score": 125.0, "accuracy": 0.75, "accuracy_plus": 0.5, "questions": 4}
    code = {"score": 200.0, "accuracy": 1.0, "accuracy_plus": 1.0, "questions": 2}
    return {"perception": 125.0, "cognition": 200.0, "by_task": {"existence": existence, "code_reasoning": code}}


@pytest.mark.parametrize(
    ("labels", "files"),
    [
        (
            "{release}/{task}/questions_answers_YN/{stem}.txt",
            [
                f"{RELEASE}/existence/questions_answers_YN/a.b.txt",
                f"{RELEASE}/existence/questions_answers_YN/000000006040.txt",
                f"{RELEASE}/code_reasoning/questions_answers_YN/0020.txt",
            ],
        ),
        (
            "{release}/{task}/{stem}.txt",
            [
                f"{RELEASE}/existence/a.b.txt",
                f"{RELEASE}/existence/000000006040.txt",
                f"{RELEASE}/code_reasoning/0020.txt",
            ],
        ),
        (
            "eval_tool/Your_Results/{task}.txt",
            ["eval_tool/Your_Results/existence.txt", "eval_tool/Your_Results/code_reasoning.txt"],
        ),
    ],
)
def test_scores_by_hand(tmp_path, labels, files):
    _write(tmp_path / "MME", labels=labels)
    (tmp_path / "MME" / RELEASE / "existence").mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (5, 3)).save(tmp_path / "MME" / RELEASE / "existence" / "a.b.jpg")
    benchmark = MME(epath.Path(tmp_path))
    assert benchmark.questions[0].image().size == (5, 3)
    assert [str(file.relative_to(tmp_path / "MME")) for file in benchmark.labels] == files
    assert benchmark.metrics(TEXTS) == _expected_metrics()
    correct = sum(task["accuracy"] * task["questions"] for task in _expected_metrics()["by_task"].values())
    assert sum(score.value for score in benchmark.scores(TEXTS)) == pytest.approx(correct)
    json.dumps(benchmark.metrics(TEXTS))


def test_keep_first_keeps_both_questions_of_an_image(tmp_path):
    _write(tmp_path)
    benchmark = MME(epath.Path(tmp_path))
    benchmark.keep_first(1)
    assert [(question.id, question.text) for question in benchmark.questions] == [
        ("existence/a.b.jpg", "Is there a dog?" + WORD),
        ("existence/a.b.jpg", "Is there a cat?" + WORD),
    ]
    scores = {"score": 50.0, "accuracy": 0.5, "accuracy_plus": 0.0, "questions": 2}  # one of two
    assert benchmark.metrics(["Yes", "Yes"]) == {
        "perception": 50.0,
        "cognition": 0.0,
        "by_task": {"existence": scores},
    }


def test_the_submission_groups_lines_by_image(tmp_path):
    _write(tmp_path)
    files = MME(epath.Path(tmp_path)).write_submission(["Yes\tor\nno", *TEXTS[1:]], epath.Path(tmp_path / "out"))
    assert files == [tmp_path / "out/mme_results/existence.txt", tmp_path / "out/mme_results/code_reasoning.txt"]
    # The label files are written in reverse order, with two spaces in every other question.
    assert files[0].read_text() == (
        "a.b.txt\tIs there a dog?  Please answer yes or no.\tYes\tYes or no\n"
        "a.b.txt\tIs there a cat?  Please answer yes or no.\tNo\tNo\n"
        "000000006040.txt\tIs there a dog?  Please answer yes or no.\tNo\tno\n"
        "000000006040.txt\tIs there a tie? Please answer yes or no.\tYes\tNo\n"
    )
    assert files[1].read_text() == (
        "0020.txt\tIs the output '1'? Please answer yes or no.\tYes\tyes.\n"
        "0020.txt\tIs the output '7'? Please answer yes or no.\tNo\tNo, it is 7\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        ("Yes, no doubt", "yes"),
        ("not at all", "no"),
        ("I know", "other"),
        ("know", "no"),
        ("y", "other"),
        ("n", "other"),
        ("Y.", "other"),
        ("A. no", "other"),
        ("B. yes", "other"),
        ("a no", "no"),
        (".yes", "yes"),
        ("..yes", "other"),
        ("y.e.s", "other"),
        ("", "other"),
    ],
)
def test_parse_yes_no_matches_mmes_own_program(text, expected):
    assert parse_yes_no(text) == expected


def test_parse_yes_no_matches_lmms_eval_without_full_stops():
    reference, rng = load_task_module("mme/utils.py"), random.Random(0)
    pieces = ["yes", "no", "Yes", "NO", "y", "n", "Y", "N", "o", "e", "s", " ", "\n", "\t", "a", "not", "1"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 6))).strip() for _ in range(20_000)]
    texts = [text for text in texts if len(text) != 1]  # lmms-eval accepts y or n alone; MME's own program does not
    answers = [parse_yes_no(text) for text in texts]
    assert answers == [reference.parse_pred_ans(text) for text in texts]
    assert min(map(answers.count, ("yes", "no", "other"))) > 2000


def test_image_ids_are_compared_as_text(tmp_path):
    _write(tmp_path, labels="eval_tool/Your_Results/{task}.txt")
    rows = [json.loads(line) for line in (tmp_path / "llava_mme.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        if row["category"] == "code_reasoning":
            row["question_id"] = (20, "20")[number % 2 == number // 2]
    assert len({row["question_id"] for row in rows}) == 4
    (tmp_path / "llava_mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "eval_tool/Your_Results/code_reasoning.txt"
    file.write_text(file.read_text().replace("0020.png", "20.png"))
    benchmark = MME(epath.Path(tmp_path))
    assert benchmark.metrics(TEXTS) == _expected_metrics()
    benchmark.keep_first(2)
    assert len(benchmark.questions) == 4


def test_scores_match_lmms_eval(tmp_path):
    reference, rng = load_task_module("mme/utils.py"), random.Random(1)
    groups = {"perception": reference.eval_type_dict["Perception"], "cognition": reference.eval_type_dict["Cognition"]}
    questions = [
        (f"{task}/{n}.jpg", f"Is it {m}?", rng.choice(("Yes", "No")))
        for tasks in groups.values()
        for task in tasks
        for n in range(rng.randint(1, 9))
        for m in range(2)
    ]
    _write(tmp_path, questions)
    benchmark = MME(epath.Path(tmp_path))
    for _ in range(20):
        texts = [rng.choice(("yes", "No", "Maybe", gold, gold)) for _, _, gold in questions]
        rows = [
            reference.mme_process_results({"answer": gold, "category": name.split("/")[0], "question_id": name}, [text])
            for (name, _, gold), text in zip(questions, texts, strict=True)
        ]
        metrics = benchmark.metrics(texts)
        for group, tasks in groups.items():
            scores = [row[f"mme_{group}_score"] for row in rows if f"mme_{group}_score" in row]
            assert metrics[group] == pytest.approx(reference.mme_aggregate_results(scores), abs=1e-9)
            for task in tasks:
                score = reference.mme_aggregate_results([row for row in scores if row["category"] == task])
                assert metrics["by_task"][task]["score"] == pytest.approx(score, abs=1e-9)
                assert metrics["by_task"][task]["questions"] == sum(row["category"] == task for row in scores)


def _open_error(folder):
    with pytest.raises(UserError) as error:
        MME(epath.Path(folder))
    return str(error.value)


def test_every_image_needs_two_questions(tmp_path):
    _write(tmp_path, QUESTIONS[:3])
    assert _open_error(tmp_path) == (
        f"{tmp_path}/llava_mme.jsonl: code_reasoning/0020.png has 1 questions, but every image must have two."
    )


def test_unknown_tasks_are_refused(tmp_path):
    _write(tmp_path, [("colour/0.jpg", "Is it red?", "Yes"), ("colour/0.jpg", "Is it blue?", "No")])
    assert _open_error(tmp_path) == (
        f"{tmp_path}/llava_mme.jsonl, question colour/0.jpg: unknown category 'colour'; did you mean 'color'?"
    )


def test_labels_are_required(tmp_path):
    _write(tmp_path, labels="elsewhere/{task}/{stem}.txt")
    assert _open_error(tmp_path) == (
        f"mme: {tmp_path} has no labels for existence: neither {RELEASE}/existence/questions_answers_YN/*.txt nor "
        f"{RELEASE}/existence/*.txt nor eval_tool/Your_Results/existence.txt."
    )


def test_labels_of_other_questions_are_refused(tmp_path):
    _write(tmp_path)
    (tmp_path / RELEASE / "existence/questions_answers_YN/000000006040.txt").unlink()
    assert _open_error(tmp_path) == (
        f"The labels in {tmp_path} do not match the questions: 2 of 6 have no label, such as 'Is there a dog?' on "
        "existence/000000006040.jpg; use MME's own files."
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("Is there a dog? Please answer yes or no. Yes", "a label needs question, answer, separated by tabs."),
        ("Is there a fox? Please answer yes or no.\tPerhaps", "the answer is 'Perhaps', neither Yes nor No."),
        (
            "Is there a dog? Please answer yes or no.\tNo",
            "'Is there a dog? Please answer yes or no.' is labeled both Yes and No; use MME's own file.",
        ),
    ],
)
def test_malformed_labels_are_refused(tmp_path, line, sentence):
    _write(tmp_path)
    file = tmp_path / RELEASE / "existence/questions_answers_YN/a.b.txt"
    with file.open("a") as opened:
        opened.write(f"\n{line}\n")
    assert _open_error(tmp_path) == f"{file}, line 4: {sentence}"


def test_the_tools_lines_need_three_columns(tmp_path):
    _write(tmp_path, labels="eval_tool/Your_Results/{task}.txt")
    file = tmp_path / "eval_tool/Your_Results/existence.txt"
    file.write_text("a.b.jpg\tIs there a dog? Please answer yes or no.\n")
    assert _open_error(tmp_path) == f"{file}, line 1: a label needs file, question, answer, separated by tabs."


def test_labels_that_are_not_text_are_refused(tmp_path):
    _write(tmp_path)
    file = tmp_path / RELEASE / "existence/questions_answers_YN/a.b.txt"
    file.write_bytes(b"\xff\xfe\x00")
    assert _open_error(tmp_path).startswith(f"{file} cannot be read: ")
