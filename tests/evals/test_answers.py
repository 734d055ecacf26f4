"""Answer files: written exactly in LLaVA's format, read from any writer, and matched with their questions."""

import json
import random
import re

import pytest
from etils import epath
from make_evals import FixedBenchmark

from stf_jax.config import UserError
from stf_jax.evals.answers import answer_line, match_answers, read_answers
from stf_jax.evals.benchmark import Question

SHORTUUID = "[2-9A-HJ-NP-Za-km-z]{22}"  # no 0, 1, I, O, l


def make_benchmark(*keys):
    """A benchmark with questions of these ids, or ids and prompts."""
    pairs = [key if isinstance(key, tuple) else (key, f"What is {key}?") for key in keys]
    return FixedBenchmark([Question(key, prompt, None, prompt) for key, prompt in pairs])


def write(folder, *rows):
    file = epath.Path(folder) / "answers.jsonl"
    file.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return file


def row(key, text, **others):
    return {"question_id": key, "text": text} | others


# ---- Writing ---------------------------------------------------------------------------------------------------------


def test_a_line_has_llavas_keys_in_order_and_keeps_types():
    question = Question(7, "Was ist das?", None, "Was ist das, 紺?", {"kind": "ü"})
    line = answer_line(question, 0, "Ein Straßen\u2028schild — 日本\n🤗", "llava-stf")
    assert re.fullmatch(
        r'\{"question_id": 7, "prompt": "Was ist das, 紺\?", "text": "Ein Straßen\u2028schild — 日本\\n🤗", '
        rf'"answer_id": "{SHORTUUID}", "model_id": "llava-stf", "metadata": \{{"kind": "ü"\}}\}}',
        line,
    )
    assert '"question_id": "7"' in answer_line(Question("7", "", None, ""), 0, "", "m")


def test_answer_ids_are_reproducible_and_differ_between_questions():
    first, again = make_benchmark("a", "b", ("b", "other"), "b"), make_benchmark("a", "b", ("b", "other"), "b")

    def ids(benchmark, model="m"):
        lines = [answer_line(question, index, "yes", model) for index, question in enumerate(benchmark.questions)]
        return [json.loads(line)["answer_id"] for line in lines]

    assert ids(first) == ids(again)
    assert len({*ids(first), *ids(first, "n")}) == 8


def test_any_text_survives_a_round_trip(tmp_path):
    rng = random.Random(0)
    alphabet = 'aÄ紺🤗 \n\r\t"\\\u2028\u2029\x85\x0b\x1c\x00\ufffd\u00a0{}'
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(9))) for _ in range(500)]
    benchmark = make_benchmark(*range(500))
    lines = [answer_line(q, i, text, "m") + "\n" for i, (q, text) in enumerate(zip(benchmark.questions, texts))]  # noqa: B905
    file = epath.Path(tmp_path) / "answers.jsonl"
    file.write_bytes("".join(lines).encode())
    rows = read_answers(file)
    assert [row["text"] for row in rows] == texts
    assert [row["question_id"] for row in rows] == list(range(500))
    assert match_answers(benchmark, rows, file) == [text.strip() for text in texts]


# ---- Reading ---------------------------------------------------------------------------------------------------------


def test_a_malformed_answer_file_is_reported_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"^There is no answer file .*absent\.jsonl\.$"):
        read_answers(epath.Path(tmp_path) / "absent.jsonl")
    file = epath.Path(tmp_path) / "answers.jsonl"
    for line, sentence in (
        ('{"question_id": 1, "text": "y', r", line 3 is not JSON: Unterminated string"),
        ("[1, 2]", ", line 3: an answer needs question_id and text"),
        ('{"question_id": 1.5, "text": "yes"}', ", line 3: an answer needs question_id and text"),
        ('{"question_id": null, "text": "yes"}', ", line 3: an answer needs question_id and text"),
        ('{"question_id": 1, "text": ["yes"]}', ", line 3: an answer needs question_id and text"),
        ('{"question_id": 1, "answer": "yes"}', ", line 3: an answer needs question_id and text"),
        ('{"text": "yes"}', ", line 3: an answer needs question_id and text"),
        ('{"question_id": 1, "text": "yes", "prompt": ["a"]}', ", line 3: prompt must be a string"),
    ):
        file.write_text('{"question_id": 0, "text": "yes"}\n\n' + line + "\n")
        with pytest.raises(UserError, match=f"^{re.escape(str(file))}{sentence}"):
            read_answers(file)
    file.write_bytes(b'{"question_id": 0, "text": "\xff"}\n')
    with pytest.raises(UserError, match=f"^{re.escape(str(file))} cannot be read: .*utf-8"):
        read_answers(file)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))} cannot be read: Is a directory"):
        read_answers(epath.Path(tmp_path))


def test_answers_match_their_questions_in_any_order_and_by_ids_of_either_type(tmp_path):
    benchmark = make_benchmark(1, "2", "three")
    rows = [row("three", " c\n"), row("1", "a", prompt="any other"), row(2, "b", model_id="m")]
    assert match_answers(benchmark, rows, write(tmp_path, *rows)) == ["a", "b", "c"]
    assert match_answers(benchmark, [*rows, row(1, "a ")], tmp_path) == ["a", "b", "c"]  # twice, but equal


def test_questions_with_the_same_id_are_matched_by_prompt(tmp_path):
    """As in MME and TextVQA, whose question ids are image ids."""
    benchmark = make_benchmark(("p", "Is it a dog?"), ("p", "Is it a cat?"), "q")
    rows = [row("p", "no", prompt="Is it a cat?"), row("q", "red"), row("p", "yes", prompt="Is it a dog?")]
    assert match_answers(benchmark, rows, tmp_path) == ["yes", "no", "red"]
    with pytest.raises(UserError, match=r"1 of its 3 answers are to other questions, such as 'p'\.$"):
        match_answers(benchmark, [*rows[:2], row("p", "yes", prompt="Is it a cow?")], tmp_path)
    with pytest.raises(UserError, match=r"leaves 1 of 3 questions unanswered, such as 'p'\.$"):
        match_answers(benchmark, rows[:2], tmp_path)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row(1, "a")], "FILE leaves 2 of 3 questions unanswered, such as 2."),
        ([], "FILE leaves 3 of 3 questions unanswered, such as 1."),
        ([row(n, "a") for n in (1, 2, 3)] + [row("2", "b")], "FILE has two different answers for question '2'."),
        (
            [row(n, "a") for n in (1, 2, 3, "x", "y")],
            "FILE does not match the benchmark: 2 of its 5 answers are to other questions, such as 'x'.",
        ),
        (
            [row(n, "a") for n in ("x", "y", "z")],
            "FILE does not match the benchmark: 3 of its 3 answers are to other questions, such as 'x'.",
        ),
    ],
)
def test_answers_that_do_not_match_are_refused(rows, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        match_answers(make_benchmark(1, 2, 3), rows, epath.Path("FILE"))
    assert str(error.value) == sentence


def test_answers_to_questions_beyond_the_limit_are_ignored(tmp_path):
    """Even if the limit splits questions with the same id: the remaining one is still matched by prompt."""
    rows = [row("p", "yes", prompt="Is it a dog?"), row("p", "no", prompt="Is it a cat?"), row("q", "red")]
    for count, texts in ((1, ["yes"]), (2, ["yes", "no"]), (3, ["yes", "no", "red"])):
        benchmark = make_benchmark(("p", "Is it a dog?"), ("p", "Is it a cat?"), "q")
        benchmark.limit(count)
        assert match_answers(benchmark, rows, tmp_path) == texts
        assert match_answers(benchmark, rows[::-1], tmp_path) == texts
    benchmark = make_benchmark(*"pq")
    benchmark.limit(1)
    with pytest.raises(UserError, match="leaves 1 of 1 questions unanswered"):
        match_answers(benchmark, rows[2:], tmp_path)
    # Prompts are ignored where ids are unique.
    assert match_answers(benchmark, [row("q", "a", prompt="other"), row("p", "b", prompt="other")], tmp_path) == ["b"]
