"""Tests the encoding of conversations against LLaVA's code and the published templates of each model family."""

import dataclasses
import json
import pathlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from special_tokens import count_special_tokens
from tokenizers import Tokenizer, processors
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stf_jax.config import UserError
from stf_jax.data.conversation import TEMPLATES, check_template, count_tokens, encode, stop_tokens, template_items
from stf_jax.data.packing import to_example
from stf_jax.data.pipeline import Preprocessor
from stf_jax.data.records import BadRow, Record, Turn
from stf_jax.data.tokenizer import load_tokenizer, save_tokenizer
from stf_jax.models.decoders.chat import Control, Mark, Text
from stf_jax.models.decoders.llama import SYSTEM

SLOTS = 5
PLENTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def miniature():
    return load_tokenizer("miniature")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """SmolLM2's tokenizer, with its chat template."""
    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(params=["miniature", "llama"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["v1 miniature", "v1 llama", "llama-3 llama_3", "chatml smollm2", "mistral llama"])
def chat(request):
    """A template and a matching tokenizer."""
    template, kind = request.param.split()
    return template, request.getfixturevalue(kind)


def record(*texts, images=0, first="human"):
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = tuple(Turn(speakers[i % 2], text) for i, text in enumerate(texts))
    return Record("row-7", (None,) * images, turns)


def encoded(template, row, tokenizer, slots=SLOTS):
    return encode(template_items(template, row), tokenizer, slots)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def target_texts(result, tokenizer, template="v1"):
    """Returns the decoded target tokens, one text per end of an answer."""
    (stop, *_), texts = stop_tokens(template, tokenizer), [[]]
    for token in result.tokens[result.is_target]:
        if token == stop:
            texts.append([])
        else:
            texts[-1].append(int(token))
    assert texts.pop() == [], "the last answer has no end"
    return [tokenizer.decode(tokens) for tokens in texts]


# ---- v1 --------------------------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one round": record("<image>\nWhat is this?", "A cat.", images=1),
    "image last": record("What is this?\n<image>", "A cat.", images=1),
    "image in the midst": record("What is <image> this?", "A cat.", images=1),
    "rounds": record("<image>\nWhat?", "A cat.", "Which color?", "Black and white.", "Sure?", "Yes", images=1),
    "image later": record("Hello", "Hi! How can I help?", "<image>\nWhat is this?", "A cat.", images=1),
    "images": record("<image>\n<image>\nSame?", "No.", "And <image>?", "Also no", images=3),
    "text": record("Write a haiku.", "An old silent pond\nA frog jumps into the pond\nSplash! Silence again."),
    "unicode": record("¿Qué es esto?\n<image>", "Ein Straßenschild — 日本 🤗", images=1),
    "no question": record("<image>\n", "A cat.", " <image> ", "A dog.", images=2),
    "begun by gpt": record("Good day.", "What is <image>?", "A dog", first="gpt", images=1),
}


def reference_v1(turns, tokenizer, slots):
    """Encodes piece by piece; the length of a piece without its answer gives the start of the answer."""
    tokens, is_target, is_image = [tokenizer.bos_token_id], [False], [False]

    def add_text(prompt, answer=""):
        new, known = ids(tokenizer, prompt + answer), len(ids(tokenizer, prompt))
        tokens.extend(new)
        is_target.extend([False] * known + [True] * (len(new) - known))
        is_image.extend([False] * len(new))

    def add_special(count, is_target_token, is_image_token):
        tokens.extend([tokenizer.eos_token_id] * count)
        is_target.extend([is_target_token] * count)
        is_image.extend([is_image_token] * count)

    prompt = SYSTEM + " "
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        prompt += "USER: "
        text = question.text.replace("<image>", "").strip()
        for i in reversed(range(question.text.count("<image>"))):
            add_text(prompt)
            add_special(slots, False, True)
            prompt = "\n" * bool(text or i)
        prompt += text + " ASSISTANT:"
        add_text(prompt, " " + answer.text)
        add_special(1, True, False)
        prompt = ""
    return tokens, is_target, is_image


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_v1(name, tokenizer):
    row = CONVERSATIONS[name]
    turns = row.turns[1:] if name == "begun by gpt" else row.turns
    result = encoded("v1", row, tokenizer)
    tokens, is_target, is_image = reference_v1(turns, tokenizer, SLOTS)
    assert result.tokens.tolist() == tokens
    assert result.is_target.tolist() == is_target
    assert result.is_image.tolist() == is_image
    assert (result.tokens.dtype, result.is_target.dtype, result.is_image.dtype) == (np.int32, bool, bool)
    # The same, without the reference.
    answers = [turn.text for turn in turns if turn.speaker == "gpt"]
    assert [text.strip() for text in target_texts(result, tokenizer)] == answers
    assert result.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert result.is_image.sum() == SLOTS * len(row.images)
    assert not (result.is_image & result.is_target).any()


def llava_v1(turns, model, bare=None):
    """LLaVA's preprocess_v1 with the sentencepiece package: ids with −200 for an image, and labels with −100.

    ``bare``: the model without its prefix space, which reads what follows ``</s>`` where the tokenizer says
    ``legacy: false``; LLaVA then takes one token less for each later round.
    """
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
                tokens += [2] * (j > 0) + (bare if bare and j else model).encode(part)
        return tokens

    tokens = tokenize(text)
    labels = list(tokens)
    labels[0] = -100
    current = 1
    for i, a_round in enumerate(filter(None, text.split("</s>"))):
        question, separator, _ = a_round.partition(" ASSISTANT: ")
        fewer = int(bare is not None and i > 0)
        instruction = len(tokenize(question + separator)) - 2 - fewer
        labels[current : current + instruction] = [-100] * instruction
        current += len(tokenize(a_round)) - fewer
    assert current == len(tokens), "tokenization mismatch"
    return tokens, labels


# LLaVA knows one image a turn.
@pytest.mark.parametrize("name", sorted(CONVERSATIONS.keys() - {"images", "begun by gpt"}))
def test_v1_matches_llava(name, sentencepiece_model, llama):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokens, labels = llava_v1(CONVERSATIONS[name].turns, model)
    result = encoded("v1", CONVERSATIONS[name], llama, slots=1)
    assert np.where(result.is_image, -200, result.tokens).tolist() == tokens
    assert np.where(result.is_target, result.tokens, -100).tolist() == labels


@pytest.fixture(scope="session")
def vicuna(llama, tmp_path_factory):
    """Llama's tokenizer as published with Vicuna 1.5."""
    folder = tmp_path_factory.mktemp("vicuna")
    shutil.copytree(llama.name_or_path, folder, dirs_exist_ok=True)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"legacy": False}))
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def bare(sentencepiece_model):
    """SentencePiece without its prefix space, like the slow tokenizer with ``legacy: false``."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sentencepiece_model.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.mark.parametrize("source", ["published", "imported", "transformers"])
def test_v1_of_a_tokenizer_that_is_not_legacy(source, sentencepiece_model, vicuna, bare, tmp_path):
    """LLaVA's slow tokenizer puts no space after ``</s>``, so ``USER`` is one token there, not two."""
    model, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model)), vicuna
    if source != "published":
        save_tokenizer(vicuna, pathlib.Path(vicuna.name_or_path), tmp_path)
        if source == "transformers":  # its own format, which puts no space before a space
            backend = vicuna.backend_tokenizer
            values = json.loads(backend.to_str()) | {"normalizer": None}
            values["pre_tokenizer"] = json.loads(Metaspace("\u2581", "first", split=False).__getstate__())
            (tmp_path / "tokenizer.json").write_text(json.dumps(values))
            (tmp_path / "tokenizer.model").unlink()
        tokenizer = load_tokenizer(str(tmp_path))
    for name in CONVERSATIONS.keys() - {"images", "begun by gpt"}:
        row = CONVERSATIONS[name]
        tokens, labels = llava_v1(row.turns, model, bare)
        result = encoded("v1", row, tokenizer, slots=1)
        assert np.where(result.is_image, -200, result.tokens).tolist() == tokens, name
        assert np.where(result.is_target, result.tokens, -100).tolist() == labels, name
        assert count_tokens([template_items("v1", row)], tokenizer, 1) == [len(tokens)], name
        assert (tokenizer.convert_tokens_to_ids("USER") in tokens) == (len(row.turns) > 2), name


def test_legacy_changes_the_tokenizer_fingerprint(llama, vicuna):
    """So that a run is not resumed with different tokens."""
    prints = {Preprocessor.fingerprint(SimpleNamespace(_tokenizer=tokenizer)) for tokenizer in (llama, vicuna)}
    assert len(prints) == 2


def llava_plain(turns, model):
    """LLaVA's preprocess_plain with the sentencepiece package."""
    tokens = [1, -200, *model.encode(turns[1].text + "\n")]
    return tokens, [-100, -100, *tokens[2:]]


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("v1", CONVERSATIONS["rounds"]),
        ("v1", CONVERSATIONS["image later"]),
        ("v1", CONVERSATIONS["text"]),
        ("plain", record("<image>\nDescribe.", "select luxury furniture, in Straße 東京", images=1)),
    ],
)
def test_truncation_matches_llava(template, row, sentencepiece_model, llama):
    """LLaVA inserts SLOTS positions per image into ids and labels, then truncates both; the loss shifts labels."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    pairs = zip(*{"v1": llava_v1, "plain": llava_plain}[template](row.turns, model), strict=True)
    reference = [pair for token, label in pairs for pair in [(token, label)] * (SLOTS if token == -200 else 1)]
    result, compared = encoded(template, row, llama), 0
    assert len(result.tokens) == len(reference)
    for length in range(1, len(reference) + 1):
        tokens, labels = map(list, zip(*reference[:length], strict=True))
        image_is_cut = any(token == -200 for token, _ in reference[length:])
        if image_is_cut or set(labels[1:]) <= {-100}:
            problem = r"^Record 'row-7' has (images beyond|no answer within) data\.max_length"
            with pytest.raises(BadRow, match=problem) as e:
                to_example(result, np.zeros((0, 2, 2, 3), np.uint8), length, "row-7")
            assert e.value.reason == "over_length"
            continue
        example = to_example(result, np.zeros((0, 2, 2, 3), np.uint8), length, "row-7")
        assert np.where(example.image_slots >= 0, -200, example.tokens).tolist() == tokens
        assert np.where(example.loss_mask, example.targets, -100).tolist() == [*labels[1:], -100]
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_turns_are_stripped(template, llama):
    """Unlike in LLaVA, which keeps white space in answers and in turns without an image."""
    spaced, bare = (
        record("<image>\n What? ", "\n A cat. \n", images=1),
        record("<image>\nWhat?", "A cat.", images=1),
    )
    assert encoded(template, spaced, llama).tokens.tolist() == encoded(template, bare, llama).tokens.tolist()


def test_v1_decodes_to_vicunas_format(miniature):
    row = record("<image>\nWhat is this?", "Cat", "What color?", "Black and white", images=1)
    result = encoded("v1", row, miniature, slots=1)
    assert miniature.decode(result.tokens) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: </s>\nWhat is this? ASSISTANT: Cat</s>"
        "USER: What color? ASSISTANT: Black and white</s>"
    )
    assert miniature.decode(result.tokens[result.is_target]) == " Cat</s> Black and white</s>"


def test_a_conversation_that_ends_with_a_question_is_a_prompt(tokenizer):
    complete = encoded("v1", record("<image>\nWhat?", "A cat.", "Sure?", "Yes", images=1), tokenizer)
    prompt = encoded("v1", record("<image>\nWhat?", "A cat.", "Sure?", images=1), tokenizer)
    answer = len(ids(tokenizer, "USER: Sure? ASSISTANT: Yes")) - len(ids(tokenizer, "USER: Sure? ASSISTANT:"))
    assert prompt.tokens.tolist() == complete.tokens[: -answer - 1].tolist()
    assert prompt.is_target.tolist() == complete.is_target[: -answer - 1].tolist()
    assert tokenizer.decode(prompt.tokens).endswith("USER: Sure? ASSISTANT:")


def test_an_instruction_without_its_caption_is_a_prompt(tokenizer):
    complete = encoded("plain", record("Describe.\n<image>", "A cat.", images=1), tokenizer)
    prompt = encoded("plain", record("Describe.\n<image>", images=1), tokenizer)
    assert prompt.tokens.tolist() == complete.tokens[: len(prompt.tokens)].tolist()
    assert not prompt.is_target.any()
    assert complete.is_target[len(prompt.tokens) :].all()


@pytest.mark.parametrize(("processor", "first"), [(None, []), ("<s> $A </s>", [1]), ("$A </s>", [])])
def test_initial_and_final_tokens_of_tokenizers(miniature, processor, first):
    """Qwen's tokenizer adds no initial token; others add a final one, which is ignored: the template adds it."""
    backend = Tokenizer.from_str(miniature.backend_tokenizer.to_str())
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processor and processors.TemplateProcessing(single=processor, special_tokens=special)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    row = record("<image>\nWhat?", "A cat.", images=1)
    expected = encoded("v1", row, miniature)
    assert encoded("v1", row, other).tokens.tolist() == first + expected.tokens[1:].tolist()


def test_a_token_belongs_to_the_span_of_its_last_character(miniature):
    (the,) = ids(miniature, " the")
    for spans, is_target in (((" th", False), ("e", True)), True), (((" th", True), ("e", False)), False):
        result = encode([Text(*span) for span in spans], miniature, SLOTS)
        assert result.tokens.tolist() == [1, the]
        assert result.is_target.tolist() == [False, is_target]


# ---- Other templates -------------------------------------------------------------------------------------------------

WORDS = {
    "one round": ("What is this?", "A cat."),
    "rounds": ("What?", "A cat.\n\nBlack.", "Which color?\n", "1. Black\n2. white", "Sure?", "Yes"),
    "unicode": ("¿Qué es esto?", "Ein Straßenschild — 日本 🤗", "Don't", "it's"),
    "spaces": ("It has  two", "or   three\t\n  of them"),
    "question": ("What?", "A cat.", "Sure?"),
}


def messages(texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text.strip()} for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", WORDS)
def test_chatml_matches_smollm2(name, smollm2):
    texts = WORDS[name]
    chat = [{"role": "system", "content": "You are a helpful assistant."}, *messages(texts)]
    reference = smollm2.apply_chat_template(chat, add_generation_prompt=len(texts) % 2 == 1)["input_ids"]
    assert encoded("chatml", record(*texts), smollm2).tokens.tolist() == reference


@pytest.mark.parametrize("name", WORDS)
def test_mistral_matches_mistral_common(name, llama):
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    texts = WORDS[name]
    chat = [(UserMessage, AssistantMessage)[i % 2](content=text.strip()) for i, text in enumerate(texts)]
    result = encoded("mistral", record(*texts), llama)
    end = len(result.tokens)
    if len(texts) % 2 == 0:  # mistral_common only encodes prompts
        chat.append(UserMessage(content="More"))
    reference = MistralTokenizer.v1().encode_chat_completion(ChatCompletionRequest(messages=chat)).tokens
    assert result.tokens.tolist() == reference[:end]
    assert len(texts) % 2 == 0 or len(reference) == end


def published_llama_3(texts, tokenizer, slots=SLOTS):
    """Returns ids in the format that Meta documents; None for image slots."""
    text_so_far = "<|begin_of_text|>"
    for i, text in enumerate(texts):
        images = "<image>\n" * text.count("<image>")
        text = images + text.replace("<image>", "").strip()
        text_so_far += f"<|start_header_id|>{('user', 'assistant')[i % 2]}<|end_header_id|>\n\n{text}<|eot_id|>"
    if len(texts) % 2:
        text_so_far += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    first, *rest = (ids(tokenizer, piece) for piece in text_so_far.split("<image>"))
    return first + [token for piece in rest for token in [None] * slots + piece]


PIRATE = "You are a pirate.\n Speak so."


def with_system(row, text=f" {PIRATE}\n"):
    """Returns the same record with a system text."""
    return Record(row.id, row.images, (Turn("system", text), *row.turns))


@pytest.mark.parametrize("name", WORDS)
def test_system_texts_match_the_published_templates(name, llama, llama_3, smollm2):
    """Against SmolLM2's chat template, mistral_common, Meta's documented format, and Vicuna's format."""
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    texts, asks = WORDS[name], len(WORDS[name]) % 2 == 1
    row = with_system(record(*texts))
    chat = [{"role": "system", "content": PIRATE}, *messages(texts)]
    reference = smollm2.apply_chat_template(chat, add_generation_prompt=asks)["input_ids"]
    assert encoded("chatml", row, smollm2).tokens.tolist() == reference

    chat = [SystemMessage(content=PIRATE)]
    chat += [(UserMessage, AssistantMessage)[i % 2](content=text.strip()) for i, text in enumerate(texts)]
    chat += [] if asks else [UserMessage(content="More")]
    reference = MistralTokenizer.v1().encode_chat_completion(ChatCompletionRequest(messages=chat)).tokens
    result = encoded("mistral", row, llama).tokens.tolist()
    assert result == reference[: len(result)]
    assert not asks or result == reference

    begin, *rest = published_llama_3(texts, llama_3)
    reference = ids(llama_3, f"<|start_header_id|>system<|end_header_id|>\n\n{PIRATE}<|eot_id|>")
    assert encoded("llama-3", row, llama_3).tokens.tolist() == [begin, *reference, *rest]

    result, own = (llama.decode(encoded("v1", one, llama).tokens) for one in (row, record(*texts)))
    assert own.count(SYSTEM) == 1
    assert result == own.replace(SYSTEM, PIRATE)


def test_a_system_text_is_not_a_target_and_an_empty_one_is_ignored(chat):
    template, tokenizer = chat
    row = record("<image>\nWhat?", "A cat.", "Sure?", "Yes", images=1)
    plainly, pirate = encoded(template, row, tokenizer), encoded(template, with_system(row), tokenizer)
    assert pirate.tokens[pirate.is_target].tolist() == plainly.tokens[plainly.is_target].tolist()
    assert PIRATE in tokenizer.decode(pirate.tokens[~pirate.is_target])
    assert encoded(template, with_system(row, " \n"), tokenizer).tokens.tolist() == plainly.tokens.tolist()
    assert count_tokens([template_items(template, with_system(row))], tokenizer, SLOTS) == [len(pirate.tokens)]


WITH_IMAGES = {
    "image": ("<image>\nWhat?", "A cat."),
    "images": ("<image>\n<image>\nSame?", "No.", "And <image>?", "Also no"),
}


@pytest.mark.parametrize("name", [*WORDS, *WITH_IMAGES])
def test_llama_3_matches_the_published_format(name, llama_3):
    texts = (WORDS | WITH_IMAGES)[name]
    result = encoded("llama-3", record(*texts, images="".join(texts).count("<image>")), llama_3)
    reference = published_llama_3(texts, llama_3)
    assert [None if image else token for token, image in zip(result.tokens, result.is_image, strict=True)] == reference


def test_decoded_templates(chat):
    template, tokenizer = chat
    row = record("<image>\n<image>\nSame?", "No.", "And <image>?", "Also no", images=3)
    result = encoded(template, row, tokenizer, slots=1)
    tokens = np.where(result.is_image, ids(tokenizer, "*")[-1], result.tokens)
    expected = {
        "v1": f"{SYSTEM} USER: *\n*\nSame? ASSISTANT: No.</s>USER: And ? ASSISTANT: Also no</s>",
        "llama-3": (
            "<|start_header_id|>user<|end_header_id|>\n\n*\n*\nSame?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n*\nAnd ?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nAlso no<|eot_id|>"
        ),
        "chatml": (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n*\n*\nSame?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
            "<|im_start|>user\n*\nAnd ?<|im_end|>\n<|im_start|>assistant\nAlso no<|im_end|>\n"
        ),
        "mistral": "[INST] *\n*\nSame? [/INST] No.</s>[INST] *\nAnd ? [/INST] Also no</s>",
    }[template]
    expected = expected.replace("USER: And", "USER: *\nAnd")
    decoded = tokenizer.decode(tokens).removeprefix(tokenizer.decode(tokenizer("").input_ids))
    assert decoded.replace(" ", "") == expected.replace(" ", "")  # SentencePiece begins each piece with a space
    assert not result.is_target[result.is_image].any()


def test_a_template_needs_its_control_tokens(miniature, llama, llama_3, smollm2):
    for template, tokenizer in (("llama-3", llama_3), ("chatml", smollm2)):
        check_template(template, tokenizer)
    for tokenizer in (miniature, llama, llama_3, smollm2):
        for template in ("plain", "v1", "mistral"):
            check_template(template, tokenizer)
    for template, tokenizer, token in (
        ("chatml", miniature, "<|im_start|>"),
        ("chatml", llama_3, "<|im_start|>"),
        ("llama-3", llama, "<|start_header_id|>"),
        ("llama-3", smollm2, "<|start_header_id|>"),
    ):
        with pytest.raises(UserError) as e:
            check_template(template, tokenizer)
        assert str(e.value) == f"data.template={template!r} needs the token {token}, which the tokenizer lacks."
    with pytest.raises(UserError, match=r"data\.template='chat'; did you mean 'chatml'"):
        check_template("chat", miniature)


# ---- plain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", ["<image>\nDescribe.", "Render a summary of the photo.\n<image>", "<image>"])
@pytest.mark.parametrize("caption", ["select luxury furniture", "  olive oil .\n", "Straße in 東京"])
def test_plain(instruction, caption, tokenizer):
    result = encoded("plain", record(instruction, caption, images=1), tokenizer)
    caption_ids = ids(tokenizer, caption.strip() + "\n")
    end = tokenizer.eos_token_id
    assert result.tokens.tolist() == [tokenizer.bos_token_id] + [end] * SLOTS + caption_ids
    assert result.is_target.tolist() == [False] * (1 + SLOTS) + [True] * len(caption_ids)
    assert result.is_image.tolist() == [False] + [True] * SLOTS + [False] * len(caption_ids)
    assert tokenizer.decode(result.tokens[result.is_target]) == caption.strip() + "\n"


def test_plain_with_several_images(tokenizer):
    result = encoded("plain", record("<image><image>\nCompare.", "Alike", images=2), tokenizer)
    assert result.is_image.tolist() == [False] + [True] * 2 * SLOTS + [False] * len(ids(tokenizer, "Alike\n"))


def test_plain_without_an_image_is_a_document(tokenizer):
    result = encoded("plain", record("Once upon a time", " there was a cat."), tokenizer)
    text_ids = ids(tokenizer, "Once upon a time there was a cat.")
    assert result.tokens.tolist() == [tokenizer.bos_token_id, *text_ids]
    assert tokenizer.decode(result.tokens[~result.is_target], skip_special_tokens=True) == "Once upon a time"
    assert tokenizer.decode(result.tokens[result.is_target]).strip() == "there was a cat."
    assert not result.is_image.any()


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_document_uses_no_template(template, tokenizer):
    row = record("Look: <image> It\nred:", " yes\n", "blue:", " no\n", images=1)
    result = encoded(template, dataclasses.replace(row, document=True), tokenizer)
    end, first = tokenizer.eos_token_id, ids(tokenizer, "Look: ")
    rest = ids(tokenizer, " It\nred: yes\nblue: no\n")
    assert result.tokens.tolist() == [tokenizer.bos_token_id, *first, *[end] * SLOTS, *rest]
    assert result.is_image.tolist() == [False] * (1 + len(first)) + [True] * SLOTS + [False] * len(rest)
    assert "".join(tokenizer.decode(result.tokens[result.is_target]).split()) == "yesno"


# ---- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row", "sentence"),
    [
        ("v1", Record("row-7", (), (Turn("human", "a"), Turn("human", "b"))), r"turn 2 is by 'human'"),
        ("v1", Record("row-7", (), (Turn("human", "a"), Turn("gpt", "b"), Turn("gpt", "c"))), r"turn 3 is by 'gpt'"),
        ("v1", Record("row-7", (), (Turn("human", "a"), Turn("system", "b"))), r"turn 2 is by 'system'"),
        ("v1", Record("row-7", (), (Turn("gpt", "a"), Turn("gpt", "b"))), r"turn 2 is by 'gpt'"),
        ("v1", Record("row-7", (), 2 * (Turn("system", "a"),)), r"turn 2 is by 'system'"),
        ("v1", Record("row-7", (), (Turn("system", "<image>"), Turn("human", "b"))), r"turn 1 is a system text that"),
        ("v1", record("What?", "A <image>.", images=1), r"turn 2 is an answer that contains <image>"),
        ("v1", record("<image> What?", "A cat."), r"has 0 images but 1 <image> marks"),
        ("v1", record("What?", "A cat.", images=1), r"has 1 images but 0 <image> marks"),
        ("v1", record("<image> What?", "A cat.", images=2), r"has 2 images but 1 <image> marks"),
        ("v1", record("<image>Hi", "<image>What?", "A cat.", first="gpt", images=2), r"2 images but 1 <image>"),
        ("plain", record("<image>", "A cat."), r"has 0 images but 1 <image> marks"),
        ("plain", record("Describe.", "A cat.", images=1), r"has 1 images but 0 <image> marks"),
        ("plain", record("<image>", "A cat.", "Sure?", "Yes", images=1), r"one instruction and one caption"),
        ("plain", record("<image>", "A cat.", "Sure?", images=1), r"one instruction and one caption"),
        ("plain", record("A cat.", "<image>", first="gpt", images=1), r"one instruction and one caption"),
        ("plain", record("Describe.", "<image> A cat.", images=1), r"the caption contains <image>"),
    ],
)
def test_records_that_do_not_fit_are_refused_by_id(template, row, sentence):
    with pytest.raises(UserError, match=rf"^Record 'row-7'.*{sentence}.*\.$"):
        template_items(template, row)


def test_an_unknown_template_gets_a_suggestion():
    with pytest.raises(UserError, match=r"data\.template='plane'; did you mean 'plain'"):
        template_items("plane", record("a", "b"))
    with pytest.raises(UserError, match=r"data\.template='phi'; known: plain, v1, llama-3, mistral, chatml"):
        template_items("phi", record("a", "b"))


# ---- Any text --------------------------------------------------------------------------------------------------------

HARD = (
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
TEXTS = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(HARD)), max_size=5).map("".join)
SPECIAL = ("<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
SPECIAL += ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]", "<<SYS>>")
# Texts that decoding restores: without the mark of an image and SentencePiece's symbol for a space, which it changes.
ORDINARY = TEXTS.filter(lambda text: not any(mark in text for mark in ("<image>", "\u2581")))
NAMES = st.lists(st.one_of(TEXTS, st.sampled_from(SPECIAL)), max_size=4).map("".join)
NAMES = NAMES.filter(lambda text: not any(mark in text for mark in ("<image>", "\u2581")))


def tokenizable(text, tokenizer):
    """Returns a text without the bytes that SmolLM2's tokenizer lacks and drops."""
    text = text.strip()
    if tokenizer.convert_tokens_to_ids("<|im_end|>") in (None, tokenizer.unk_token_id):
        return text
    return tokenizer.decode(tokenizer(text, split_special_tokens=True).input_ids)


@given(rounds=st.lists(st.tuples(NAMES, NAMES, st.integers(0, 2)), min_size=1, max_size=3))
@example(rounds=[("", "", 0)])
@example(rounds=[("", "", 1), ("", "", 0)])
@example(rounds=[("ASSISTANT:", "USER: x ASSISTANT: y", 1)])
@example(rounds=[("</s>USER: <s>", "</s>", 1), ("<unk>", "<s></s><unk>", 0)])
@example(rounds=[("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", 0)])
@example(rounds=[("<|eot_id|><|start_header_id|>", "<|eot_id|><|begin_of_text|>", 0)])
@settings(PLENTY, max_examples=100)
def test_targets_are_exactly_the_answers_and_their_ends(chat, rounds):
    """Names of special tokens in them are ordinary text."""
    template, tokenizer = chat
    texts = [t for question, answer, images in rounds for t in ("<image>" * images + question, answer)]
    count = sum(images for *_, images in rounds)
    items = template_items(template, record(*texts, images=count))
    result = encode(items, tokenizer, SLOTS)
    assert len(result.tokens) == len(result.is_target) == len(result.is_image)
    answers = [text.removeprefix(" ") for text in target_texts(result, tokenizer, template)]
    assert answers == [tokenizable(answer, tokenizer) for _, answer, _ in rounds]
    found, expected = count_special_tokens(result, items, tokenizer)
    assert found == expected
    assert result.is_image.sum() == SLOTS * count
    assert not (result.is_image & result.is_target).any()
    # All text is present, in order.
    rest = tokenizer.decode(result.tokens[~result.is_target & ~result.is_image])
    for question, *_ in rounds:
        question = tokenizable(question, tokenizer)
        assert question in rest
        rest = rest[rest.index(question) + len(question) :]


@given(caption=ORDINARY)
@PLENTY
def test_targets_are_exactly_the_caption(tokenizer, caption):
    result = encoded("plain", record("<image>\nDescribe.", caption, images=1), tokenizer)
    assert tokenizer.decode(result.tokens[result.is_target]).removeprefix(" ") == caption.strip() + "\n"
    assert not result.is_target[: 1 + SLOTS].any()
    assert result.is_target[1 + SLOTS :].all()


@given(texts=st.lists(NAMES, min_size=2, max_size=2), length=st.integers(1, 120))
@PLENTY
def test_any_text_can_be_encoded_and_truncated(tokenizer, texts, length):
    """The text that is cut off does not change the tokens before it."""
    result = encoded("v1", record(*texts), tokenizer)
    assert len(result.tokens) == len(result.is_target) == len(result.is_image)
    assert result.is_target[-1]
    if not result.is_target[:length].any():
        with pytest.raises(BadRow, match="has no answer within") as e:
            to_example(result, np.zeros((0, 2, 2, 3), np.uint8), length, "row-7")
        assert e.value.reason == "over_length"
        return
    row = to_example(result, np.zeros((0, 2, 2, 3), np.uint8), length, "row-7")
    assert row.tokens.tolist() == result.tokens[:length].tolist()
    assert row.targets.tolist() == [*result.tokens[1:length].tolist(), 0]
    assert row.loss_mask.tolist() == [*result.is_target[1:length].tolist(), False]


ITEMS = st.one_of(st.builds(Text, NAMES, st.booleans()), st.sampled_from([*Mark, Control("</s>"), Control("<s>")]))


@given(conversations=st.lists(st.lists(ITEMS, max_size=6), max_size=4))
@PLENTY
def test_count_tokens_matches_encode(tokenizer, conversations):
    counts = count_tokens(conversations, tokenizer, SLOTS)
    assert counts == [len(encode(items, tokenizer, SLOTS).tokens) for items in conversations]


@pytest.mark.parametrize("slots", [0, 1, 144])
def test_count_tokens_of_each_template(chat, slots):
    template, tokenizer = chat
    items = [template_items(template, row) for row in CONVERSATIONS.values()]
    counts = count_tokens(items, tokenizer, slots)
    assert counts == [len(encode(one, tokenizer, slots).tokens) for one in items]


@given(spans=st.lists(st.one_of(st.tuples(ORDINARY, st.booleans()), st.sampled_from(list(Mark))), max_size=8))
@PLENTY
def test_encode_accepts_any_items(tokenizer, spans):
    items = [span if isinstance(span, Mark) else Text(*span) for span in spans]
    result = encode(items, tokenizer, SLOTS)
    assert len(result.tokens) == len(result.is_target) == len(result.is_image)
    assert result.is_image.sum() == SLOTS * items.count(Mark.IMAGE)
    if not any(item.is_target for item in items if isinstance(item, Text)):
        assert result.is_target.sum() == items.count(Mark.END) + items.count(Mark.NEWLINE)
    if all(item.is_target for item in items if isinstance(item, Text)):
        assert (~result.is_target).sum() == 1 + result.is_image.sum()
