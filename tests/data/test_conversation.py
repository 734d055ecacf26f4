"""Conversations to tokens, against LLaVA's own way of doing it, with a byte-level and a SentencePiece tokenizer."""

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data.conversation import SYSTEM, Mark, Text, encode, template_items
from stf_jax.data.packing import to_example
from stf_jax.data.records import Record, Turn
from stf_jax.data.tokenizer import load_tokenizer

SLOTS = 5
PLENTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def miniature():
    return load_tokenizer("miniature")


@pytest.fixture(params=["miniature", "llama"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def record(*texts, pictures=0, first="human"):
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = tuple(Turn(speakers[i % 2], text) for i, text in enumerate(texts))
    return Record("row-7", (None,) * pictures, turns)


def encoded(template, row, tokenizer, slots=SLOTS):
    return encode(template_items(template, row), tokenizer, slots)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def learned_texts(result, tokenizer):
    """What the model learns to say, one text for each end of sequence."""
    end, said = tokenizer.eos_token_id, [[]]
    for token in result.tokens[result.learned]:
        if token == end:
            said.append([])
        else:
            said[-1].append(int(token))
    assert said.pop() == [], "the last answer is not ended"
    return [tokenizer.decode(tokens) for tokens in said]


# ---- v1 --------------------------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one round": record("<image>\nWhat is this?", "A cat.", pictures=1),
    "picture last": record("What is this?\n<image>", "A cat.", pictures=1),
    "picture in the midst": record("What is <image> this?", "A cat.", pictures=1),
    "rounds": record("<image>\nWhat?", "A cat.", "Which color?", "Black and white.", "Sure?", "Yes", pictures=1),
    "picture later": record("Hello", "Hi! How can I help?", "<image>\nWhat is this?", "A cat.", pictures=1),
    "pictures": record("<image>\n<image>\nSame?", "No.", "And <image>?", "Also no", pictures=3),
    "text": record("Write a haiku.", "An old silent pond\nA frog jumps into the pond\nSplash! Silence again."),
    "unicode": record("¿Qué es esto?\n<image>", "Ein Straßenschild — 日本 🤗", pictures=1),
    "begun by gpt": record("Good day.", "What is <image>?", "A dog", first="gpt", pictures=1),
}


def straightforward_v1(turns, tokenizer, slots):
    """Piece by piece; the length of a piece without its answer says where the answer begins."""
    tokens, learned, is_image = [tokenizer.bos_token_id], [False], [False]

    def say(prompt, answer=""):
        new, known = ids(tokenizer, prompt + answer), len(ids(tokenizer, prompt))
        tokens.extend(new)
        learned.extend([False] * known + [True] * (len(new) - known))
        is_image.extend([False] * len(new))

    def special(count, learn, image):
        tokens.extend([tokenizer.eos_token_id] * count)
        learned.extend([learn] * count)
        is_image.extend([image] * count)

    prompt = SYSTEM + " "
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        prompt += "USER: "
        for _ in range(question.text.count("<image>")):
            say(prompt)
            special(slots, False, True)
            prompt = "\n"
        prompt += question.text.replace("<image>", "").strip() + " ASSISTANT:"
        say(prompt, " " + answer.text)
        special(1, True, False)
        prompt = ""
    return tokens, learned, is_image


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_v1(name, tokenizer):
    row = CONVERSATIONS[name]
    turns = row.turns[1:] if name == "begun by gpt" else row.turns
    result = encoded("v1", row, tokenizer)
    tokens, learned, is_image = straightforward_v1(turns, tokenizer, SLOTS)
    assert result.tokens.tolist() == tokens
    assert result.learned.tolist() == learned
    assert result.is_image.tolist() == is_image
    assert (result.tokens.dtype, result.learned.dtype, result.is_image.dtype) == (np.int32, bool, bool)
    # What that means.
    answers = [turn.text for turn in turns if turn.speaker == "gpt"]
    assert [text.strip() for text in learned_texts(result, tokenizer)] == answers
    assert result.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert result.is_image.sum() == SLOTS * len(row.pictures)
    assert not (result.is_image & result.learned).any()


def llava_v1(turns, model):
    """LLaVA's preprocess_v1 with SentencePiece itself: ids with −200 for a picture, and labels with −100."""
    text = SYSTEM + " "
    for turn in turns:
        message = turn.text
        if "<image>" in message:
            message = ("<image>\n" + message.replace("<image>", "").strip()).strip()
        text += f"USER: {message} " if turn.speaker == "human" else f"ASSISTANT: {message}</s>"

    def tokenize(text):
        tokens = [1]
        for i, chunk in enumerate(text.split("<image>")):
            tokens += [-200] * (i > 0)
            for j, part in enumerate(chunk.split("</s>")):
                tokens += [2] * (j > 0) + model.encode(part)
        return tokens

    tokens = tokenize(text)
    labels = list(tokens)
    labels[0] = -100
    current = 1
    for a_round in filter(None, text.split("</s>")):
        question, separator, _ = a_round.partition(" ASSISTANT: ")
        instruction = len(tokenize(question + separator)) - 2
        labels[current : current + instruction] = [-100] * instruction
        current += len(tokenize(a_round))
    assert current == len(tokens), "tokenization mismatch"
    return tokens, labels


# LLaVA knows one picture a turn; and transformers merges two spaces otherwise than SentencePiece.
@pytest.mark.parametrize("name", sorted(CONVERSATIONS.keys() - {"pictures", "begun by gpt", "picture in the midst"}))
def test_v1_is_what_llava_trains_on(name, sentencepiece_model, llama):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokens, labels = llava_v1(CONVERSATIONS[name].turns, model)
    ours = encoded("v1", CONVERSATIONS[name], llama, slots=1)
    assert np.where(ours.is_image, -200, ours.tokens).tolist() == tokens
    assert np.where(ours.learned, ours.tokens, -100).tolist() == labels


def test_v1_reads_as_vicuna_was_trained(miniature):
    row = record("<image>\nWhat is this?", "Cat", "What color?", "Black and white", pictures=1)
    result = encoded("v1", row, miniature, slots=1)
    assert miniature.decode(result.tokens) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: </s>\nWhat is this? ASSISTANT: Cat</s>"
        "USER: What color? ASSISTANT: Black and white</s>"
    )
    assert miniature.decode(result.tokens[result.learned]) == " Cat</s> Black and white</s>"


def test_a_conversation_that_ends_with_a_question_is_a_prompt(tokenizer):
    whole = encoded("v1", record("<image>\nWhat?", "A cat.", "Sure?", "Yes", pictures=1), tokenizer)
    prompt = encoded("v1", record("<image>\nWhat?", "A cat.", "Sure?", pictures=1), tokenizer)
    answer = len(ids(tokenizer, "USER: Sure? ASSISTANT: Yes")) - len(ids(tokenizer, "USER: Sure? ASSISTANT:"))
    assert prompt.tokens.tolist() == whole.tokens[: -answer - 1].tolist()
    assert prompt.learned.tolist() == whole.learned[: -answer - 1].tolist()
    assert tokenizer.decode(prompt.tokens).endswith("USER: Sure? ASSISTANT:")


def test_an_instruction_without_its_caption_is_a_prompt(tokenizer):
    whole = encoded("plain", record("Describe.\n<image>", "A cat.", pictures=1), tokenizer)
    prompt = encoded("plain", record("Describe.\n<image>", pictures=1), tokenizer)
    assert prompt.tokens.tolist() == whole.tokens[: len(prompt.tokens)].tolist()
    assert not prompt.learned.any()
    assert whole.learned[len(prompt.tokens) :].all()


@pytest.mark.parametrize(("processor", "first"), [(None, []), ("<s> $A </s>", [1]), ("$A </s>", [])])
def test_tokenizers_begin_and_end_texts_as_they_like(miniature, processor, first):
    """Qwen's begins a text with nothing; others end it, which is the template's to do."""
    backend = Tokenizer.from_str(miniature.backend_tokenizer.to_str())
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processor and processors.TemplateProcessing(single=processor, special_tokens=special)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    row = record("<image>\nWhat?", "A cat.", pictures=1)
    expected = encoded("v1", row, miniature)
    assert encoded("v1", row, other).tokens.tolist() == first + expected.tokens[1:].tolist()


def test_a_token_belongs_to_the_span_of_its_last_character(miniature):
    (the,) = ids(miniature, " the")
    for spans, learned in (((" th", False), ("e", True)), True), (((" th", True), ("e", False)), False):
        result = encode([Text(*span) for span in spans], miniature, SLOTS)
        assert result.tokens.tolist() == [1, the]
        assert result.learned.tolist() == [False, learned]


# ---- plain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", ["<image>\nDescribe.", "Render a summary of the photo.\n<image>", "<image>"])
@pytest.mark.parametrize("caption", ["select luxury furniture", "  olive oil .\n", "Straße in 東京"])
def test_plain(instruction, caption, tokenizer):
    result = encoded("plain", record(instruction, caption, pictures=1), tokenizer)
    said = ids(tokenizer, caption.strip() + "\n")
    end = tokenizer.eos_token_id
    assert result.tokens.tolist() == [tokenizer.bos_token_id] + [end] * SLOTS + said
    assert result.learned.tolist() == [False] * (1 + SLOTS) + [True] * len(said)
    assert result.is_image.tolist() == [False] + [True] * SLOTS + [False] * len(said)
    assert tokenizer.decode(result.tokens[result.learned]) == caption.strip() + "\n"


def test_plain_with_several_pictures(tokenizer):
    result = encoded("plain", record("<image><image>\nCompare.", "Alike", pictures=2), tokenizer)
    assert result.is_image.tolist() == [False] + [True] * 2 * SLOTS + [False] * len(ids(tokenizer, "Alike\n"))


def test_plain_without_a_picture_is_a_document(tokenizer):
    result = encoded("plain", record("Once upon a time", " there was a cat."), tokenizer)
    said = ids(tokenizer, "Once upon a time there was a cat.")
    assert result.tokens.tolist() == [tokenizer.bos_token_id, *said]
    assert tokenizer.decode(result.tokens[~result.learned], skip_special_tokens=True) == "Once upon a time"
    assert tokenizer.decode(result.tokens[result.learned]).strip() == "there was a cat."
    assert not result.is_image.any()


# ---- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row", "sentence"),
    [
        ("v1", Record("row-7", (), (Turn("human", "a"), Turn("human", "b"))), r"turn 2 is by 'human'"),
        ("v1", Record("row-7", (), (Turn("human", "a"), Turn("gpt", "b"), Turn("gpt", "c"))), r"turn 3 is by 'gpt'"),
        ("v1", Record("row-7", (), (Turn("human", "a"), Turn("system", "b"))), r"turn 2 is by 'system'"),
        ("v1", Record("row-7", (), (Turn("gpt", "a"), Turn("gpt", "b"))), r"turn 1 is by 'gpt'"),
        ("v1", record("What?", "A <image>.", pictures=1), r"turn 2 is an answer that holds <image>"),
        ("v1", record("<image> What?", "A cat."), r"has 0 pictures but 1 <image> marks"),
        ("v1", record("What?", "A cat.", pictures=1), r"has 1 pictures but 0 <image> marks"),
        ("v1", record("<image> What?", "A cat.", pictures=2), r"has 2 pictures but 1 <image> marks"),
        ("v1", record("<image>Hi", "<image>What?", "A cat.", first="gpt", pictures=2), r"2 pictures but 1 <image>"),
        ("plain", record("<image>", "A cat."), r"has 0 pictures but 1 <image> marks"),
        ("plain", record("Describe.", "A cat.", pictures=1), r"has 1 pictures but 0 <image> marks"),
        ("plain", record("<image>", "A cat.", "Sure?", "Yes", pictures=1), r"one instruction and one caption"),
        ("plain", record("<image>", "A cat.", "Sure?", pictures=1), r"one instruction and one caption"),
        ("plain", record("A cat.", "<image>", first="gpt", pictures=1), r"one instruction and one caption"),
    ],
)
def test_a_record_that_does_not_fit_is_named(template, row, sentence):
    with pytest.raises(UserError, match=rf"^Record 'row-7'.*{sentence}.*\.$"):
        template_items(template, row)


def test_an_unknown_template_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"data\.template='plane'; did you mean 'plain'"):
        template_items("plane", record("a", "b"))
    with pytest.raises(UserError, match=r"data\.template='chatml'; known: plain, v1"):
        template_items("chatml", record("a", "b"))


# ---- Any text --------------------------------------------------------------------------------------------------------

NASTY = (
    "USER:",
    "ASSISTANT:",
    " ASSISTANT: ",
    SYSTEM,
    "\n",
    "\n\n",
    "  ",
    "\t",
    "\u00a0",
    "é",
    "日本",
    "🤗",
    "e\u0301",
    ":",
)
TEXTS = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(NASTY)), max_size=5).map("".join)
SPECIAL = ("<s>", "</s>", "<unk>", "<image>", "\u2581")  # U+2581 is SentencePiece's own mark of a space
ORDINARY = TEXTS.filter(lambda text: not any(mark in text for mark in SPECIAL))


@given(rounds=st.lists(st.tuples(ORDINARY, ORDINARY, st.integers(0, 2)), min_size=1, max_size=3))
@example(rounds=[("", "", 0)])
@example(rounds=[("", "", 1), ("", "", 0)])
@example(rounds=[("ASSISTANT:", "USER: x ASSISTANT: y", 1)])
@PLENTY
def test_exactly_the_answers_are_learned(tokenizer, rounds):
    texts = [t for question, answer, images in rounds for t in ("<image>" * images + question, answer)]
    pictures = sum(images for *_, images in rounds)
    result = encoded("v1", record(*texts, pictures=pictures), tokenizer)
    assert len(result.tokens) == len(result.learned) == len(result.is_image)
    assert [text.removeprefix(" ") for text in learned_texts(result, tokenizer)] == [a.strip() for _, a, _ in rounds]
    assert result.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert result.tokens[0] == tokenizer.bos_token_id
    assert result.is_image.sum() == SLOTS * pictures
    assert not (result.is_image & result.learned).any()
    # All text is there, and in order.
    prompts = [("\n" * images + q.replace("<image>", "").strip()) for q, _, images in rounds]
    rest = tokenizer.decode(result.tokens[~result.learned & ~result.is_image][1:])
    for prompt in prompts:
        assert prompt.strip() in rest


@given(caption=ORDINARY)
@PLENTY
def test_exactly_the_caption_is_learned(tokenizer, caption):
    result = encoded("plain", record("<image>\nDescribe.", caption, pictures=1), tokenizer)
    assert tokenizer.decode(result.tokens[result.learned]).removeprefix(" ") == caption.strip() + "\n"
    assert not result.learned[: 1 + SLOTS].any()
    assert result.learned[1 + SLOTS :].all()


@given(texts=st.lists(st.one_of(TEXTS, st.sampled_from(SPECIAL)), min_size=2, max_size=2), length=st.integers(1, 120))
@PLENTY
def test_any_text_is_encoded_and_cut_at_its_end(tokenizer, texts, length):
    """Even the names of special tokens; what is cut off changes nothing before it."""
    question, answer = (text.replace("<image>", "") for text in texts)
    result = encoded("v1", record(question, answer), tokenizer)
    assert len(result.tokens) == len(result.learned) == len(result.is_image)
    assert result.learned[-1]
    row = to_example(result, np.zeros((0, 2, 2, 3), np.uint8), length, "row-7")
    assert row["tokens"].tolist() == result.tokens[:length].tolist()
    assert row["targets"].tolist() == [*result.tokens[1:length].tolist(), 0]
    assert row["loss_mask"].tolist() == [*result.learned[1:length].tolist(), False]


@given(spans=st.lists(st.one_of(st.tuples(ORDINARY, st.booleans()), st.sampled_from(list(Mark))), max_size=8))
@PLENTY
def test_encode_takes_any_items(tokenizer, spans):
    items = [span if isinstance(span, Mark) else Text(*span) for span in spans]
    result = encode(items, tokenizer, SLOTS)
    assert len(result.tokens) == len(result.learned) == len(result.is_image)
    assert result.is_image.sum() == SLOTS * items.count(Mark.IMAGE)
    if not any(item.learned for item in items if isinstance(item, Text)):
        assert result.learned.sum() == items.count(Mark.END)
    if all(item.learned for item in items if isinstance(item, Text)):
        assert (~result.learned).sum() == 1 + result.is_image.sum()
