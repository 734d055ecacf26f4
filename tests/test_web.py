"""The page to try a model: answers over HTTP are the generator's, wrong requests get a sentence, and the page works."""

import base64
import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time

import browser
import numpy as np
import PIL.Image
import pytest
from tiny import make_generator

from stf_jax import chat
from stf_jax.cli import run_command
from stf_jax.config import UserError
from stf_jax.data.records import Record, Turn
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.generator import Generator
from stf_jax.web import server as web
from stf_jax.web.server import MAX_BYTES, Server, list_methods

QUESTION, LIMIT = "What is it?", 12
IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def generator():
    return make_generator(**{"model.fusion.fusion": "mlp", "model.fusion.taps": (1,)})


@pytest.fixture(scope="module")
def server(generator):
    with Server(generator, "mine", LIMIT, Sampling()) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


def encode(image, name="a.png", kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return {"name": name, "data": base64.b64encode(file.getvalue()).decode()}


def turn(question=QUESTION, *images, answer=""):
    return {"question": question, "images": list(images), "answer": answer}


def body(*turns, reduce="", keep=16):
    return json.dumps({"turns": turns, "reduce": reduce, "keep": keep})


def send(server, content="", method="POST", path="/answer", **headers):
    """Sends a request; returns its connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    host = f"127.0.0.1:{server.server_port}"
    defaults = {"Host": host} | ({"Origin": f"http://{host}"} if method == "POST" else {})
    connection.request(method, path, content, {k: v for k, v in (defaults | headers).items() if v is not None})
    return connection


def ask(server, content, **options):
    """Returns the status and the lines of an answer."""
    with contextlib.closing(send(server, content, **options)) as connection:
        response = connection.getresponse()
        return response.status, [json.loads(line) for line in response]


OTHER = IMAGE.rotate(90)
TURNS = [turn("One?", encode(IMAGE), answer="An <image>."), turn("<image>Two?", encode(OTHER), encode(IMAGE))]


@pytest.mark.parametrize(("reduce", "keep", "tokens"), [("", 16, 16), ("fastv:after=1", 8, 12)])
def test_a_conversation_is_answered_as_by_the_generator(server, monkeypatch, reduce, keep, tokens):
    monkeypatch.setitem(server._methods, "fastv:after=1", [8])  # fastv itself does not fit two layers
    status, lines = ask(server, body(*TURNS, reduce=reduce, keep=keep))
    texts = zip(("human", "gpt", "human"), ("<image>\nOne?", "An .", "<image>\n<image>\nTwo?"), strict=True)
    record = Record("", (IMAGE.copy, OTHER.copy, IMAGE.copy), tuple(Turn(*text) for text in texts))
    (expected,) = server._find_generator(reduce, keep).generate([record], LIMIT, 1)
    assert (status, "".join(line.get("text", "") for line in lines)) == (200, expected)
    assert lines[0] == {"ahead": 0}
    assert len([line for line in lines if "text" in line]) > 3
    done = lines[-1]
    assert (done["done"], done["tokens"], done["varies"]) == (True, tokens, bool(reduce))
    assert done["milliseconds"] > 0
    assert done["compiled"]
    assert not ask(server, body(*TURNS, reduce=reduce, keep=keep))[1][-1]["compiled"]


def test_wrong_requests_get_a_status_and_a_sentence(server):
    thin = encode(PIL.Image.new("1", (10_000, 10_000)), "bomb.png")
    broken = {"name": "cut.png", "data": encode(IMAGE)["data"][:4000]}
    good = body(*TURNS)
    cases = [
        ({"content": good, "Host": "evil.example"}, 403, "Open this page as http://127.0.0.1:"),
        ({"content": good, "Host": "127.0.0.1.evil.example:80"}, 403, "Open this page as"),
        ({"method": "GET", "path": "/", "Host": "evil.example:7860"}, 403, "Open this page as"),
        ({"content": good, "Origin": None}, 403, "Only the page of this server"),
        ({"content": good, "Origin": "http://evil.example"}, 403, "Only the page of this server"),
        ({"content": good, "Origin": "null"}, 403, "Only the page of this server"),
        ({"content": good, "path": "/model"}, 404, "There is nothing at this address"),
        *(
            ({"method": "GET", "path": path}, 404, "There is nothing at this address")
            for path in ("/page.html", "/../../etc/passwd", "//etc/passwd", "/%2e%2e/README.md", "/?a", "/answer")
        ),
        ({"Content-Length": str(MAX_BYTES + 1)}, 413, "has over 20 MiB"),
        ({"Content-Length": "9" * 5000}, 413, "has over 20 MiB"),
        ({"Content-Length": "-1"}, 411, "does not say how long"),
        ({"content": "x" * (MAX_BYTES + 1)}, 413, "has over 20 MiB"),
        ({"content": "{"}, 400, "is not a conversation"),
        ({"content": "[" * 100_000}, 400, "is not a conversation"),
        ({"content": body()}, 400, "is not a conversation"),
        ({"content": body("no turn")}, 400, "lacks a question"),
        ({"content": body(turn(" "))}, 400, "The question is empty."),
        ({"content": body(turn("\ud800"))}, 400, "is not a conversation"),
        ({"content": body(turn(QUESTION, "a.png"))}, 400, "lacks a name or data"),
        ({"content": body(turn(QUESTION, {"name": "a", "data": "?"}))}, 400, "not in base64"),
        ({"content": body(turn(QUESTION, broken))}, 400, "Image cut.png cannot be opened: "),
        ({"content": body(turn(QUESTION, thin))}, 400, "Image bomb.png cannot be opened: it has 10000x10000 pixels."),
        ({"content": body(turn(), keep=15)}, 400, "does not offer"),
        ({"content": body(turn(), reduce="os:system", keep=4)}, 400, "does not offer"),
        ({"content": body(turn("long " * 9000))}, 400, "shorten it"),
    ]
    for request, expected, message in cases:
        status, lines = ask(server, **request) if "content" in request else ask(server, "", **request)
        assert (status, len(lines)) == (expected, 1), (request, lines)
        assert message in lines[0]["error"]
        assert re.fullmatch(r"[^\n]+", lines[0]["error"])


def test_requests_wait_in_order_and_leave_with_their_clients(server, monkeypatch):
    wrote, go_on, texts, generate = threading.Event(), threading.Event(), [], Generator.generate

    def slow(self, records, limit, rows, sampling, on_text):
        def report(row, text):
            wrote.set()
            assert go_on.wait(60)
            texts.append(text)
            on_text(row, text)

        return generate(self, records, limit, rows, sampling, report)

    monkeypatch.setattr(Generator, "generate", slow)
    connections = [send(server, body(*TURNS))]
    assert wrote.wait(60)
    responses = [connections[0].getresponse()]
    assert json.loads(responses[0].readline()) == {"ahead": 0}
    for ahead in (1, 2):
        connections.append(send(server, body(*TURNS)))
        responses.append(connections[-1].getresponse())
        assert json.loads(responses[-1].readline()) == {"ahead": ahead}
    for leaves in (0, 1):  # one in the middle of its answer, and one that waits
        responses[leaves].close()
        connections[leaves].close()
    while json.loads(responses[2].readline()) != {"ahead": 1}:
        pass
    go_on.set()
    lines = [json.loads(line) for line in responses[2]]
    assert lines[-1]["done"]
    assert texts[1:] == [line["text"] for line in lines if "text" in line]  # the first ended with its first piece
    assert server.queue._requests == []


def test_the_methods_are_those_that_fit(generator):
    methods = list_methods(generator.model)
    assert methods[""] == [16]
    assert methods["pool"] == [8, 4, 1]
    assert {"visionzip", "uniform", "random", "resize"} <= {*methods}
    assert "fastv" not in methods  # it drops tokens after two layers, and there are two
    started = generator.with_reduction("fastv:after=1", 7)
    assert list_methods(started.model)["fastv:after=1"] == [8, 7, 4, 1]
