"""The page to try a model: answers over HTTP are the generator's, wrong requests get a sentence, and the page works."""

import base64
import contextlib
import http.client
import io
import json
import re
import threading

import numpy as np
import PIL.Image
import pytest
from tiny import make_generator

from stf_jax import chat
from stf_jax.cli import run_command
from stf_jax.data.image import open_image
from stf_jax.data.records import Record, Turn, make_question
from stf_jax.inference import loading
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.generator import Generator
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
    assert done["compiled"] or not reduce  # the model itself may have answered another test
    assert not ask(server, body(*TURNS, reduce=reduce, keep=keep))[1][-1]["compiled"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
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
        status, lines = ask(server, **{"content": "", **request})
        assert (status, len(lines)) == (expected, 1), (request, lines)
        assert message in lines[0]["error"]


@pytest.fixture
def held(monkeypatch):
    """Holds the first answer before its second piece; returns when it is held, when it goes on, and all pieces."""
    reached, go_on, texts, generate = threading.Event(), threading.Event(), [], Generator.generate

    def slow(self, records, limit, rows, sampling, on_text):
        def report(row, text):
            if len(texts) == 1:
                reached.set()
                assert go_on.wait(60)
            texts.append(text)
            on_text(row, text)

        return generate(self, records, limit, rows, sampling, report)

    monkeypatch.setattr(Generator, "generate", slow)
    return reached, go_on, texts


def test_requests_wait_in_order_and_leave_with_their_clients(server, held):
    reached, go_on, texts = held
    connections = [send(server, body(*TURNS))]
    assert reached.wait(60)
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
    assert texts[2:] == [line["text"] for line in lines if "text" in line]  # the first ended at its second piece
    assert server.queue._requests == []


def test_the_methods_are_those_that_fit(generator):
    methods = list_methods(generator.model)
    assert methods[""] == [16]
    assert methods["pool"] == [8, 4, 1]
    assert {"visionzip", "uniform", "random", "resize"} <= {*methods}
    assert "fastv" not in methods  # it drops tokens after two layers, and there are two
    started = generator.with_reduction("fastv:after=1", 7)
    assert list_methods(started.model)["fastv:after=1"] == [8, 7, 4, 1]


def test_the_command_serves_until_it_is_interrupted(server, generator, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_generator", lambda *_, **__: (generator, None))
    monkeypatch.setattr(Server, "serve_forever", interrupt)
    assert run_command(chat.main, ["--checkpoint=.", "--web", "--port=0"]) == 0
    assert re.fullmatch(r"open http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", capsys.readouterr().out)
    cases = [
        (["--web", f"--port={server.server_port}"], "cannot be used: Address already in use; choose another --port."),
        (["--web", "--port=65536"], "--port=65536 must be 0 to 65,535."),
        (["--web", "--prompt=What?"], "leave out --image and --prompt."),
        (["--port=80"], "--port has no effect without --web."),
    ]
    for options, message in cases:
        assert run_command(chat.main, ["--checkpoint=.", *options]) == 2, options
        assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}\n", capsys.readouterr().err)


# ---- The page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(server, chromium):
    """The page as it is when it is opened."""
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(server.url, 400, dark=True)
    chromium.wait_for('document.querySelectorAll(".sample").length')
    return chromium


def press_ask(page, question=""):
    """Asks the question, or the one that is there, and waits for the end of the answer."""
    page.evaluate(f'find("question").value ||= {json.dumps(question)}; find("send").click()')
    page.wait_for('!document.body.classList.contains("busy")')


def shown(page, selector):
    return page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(item => item.textContent)")


def test_the_page_asks_a_sample_with_a_method(server, page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    options = page.evaluate('[...find("method").options].map(option => [option.value, option.text])')
    assert options == [[name, name or "mlp (as trained)"] for name in server._methods]
    page.evaluate('find("method").value = "pool"; find("method").dispatchEvent(new Event("change"))')
    assert page.evaluate('[...find("budget").options].map(option => option.value)') == ["8", "4", "1"]
    sample = server.about["samples"][3]
    page.evaluate('document.querySelectorAll(".sample")[3].click()')
    press_ask(page)
    image = open_image(base64.b64decode(sample["data"]), "")
    record, pooled = make_question("", [image.copy], sample["question"]), server._find_generator("pool", 4)
    (expected,) = pooled.generate([record], LIMIT, 1)
    assert shown(page, ".answer .text") == [expected]
    assert re.fullmatch(r"pool · 4 tokens per image · [0-9,]+ ms( with compiling)?", shown(page, ".answer .soft")[0])
    press_ask(page, "And now?")
    record = Record("", record.images, (*record.turns, Turn("gpt", expected), Turn("human", "And now?")))
    assert shown(page, ".answer .text") == [expected, *pooled.generate([record], LIMIT, 1)]
    assert page.errors == []
    assert {re.match("data:|http://[^/]+/", url)[0] for url in page.requests} == {"data:", server.url}


def test_escape_stops_an_answer_and_keeps_its_text(page, held):
    reached, go_on, texts = held
    page.evaluate('find("question").value = "Well?"; find("send").click()')
    assert reached.wait(60)
    page.wait_for('[...document.querySelectorAll(".answer .text")].at(-1).textContent')
    assert page.evaluate('find("send").textContent') == "Stop"
    page.evaluate('dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}))')
    page.wait_for('find("send").textContent === "Ask"')
    assert (shown(page, ".answer .text")[-1], shown(page, ".answer .soft")[-1]) == (texts[0], "stopped")
    assert shown(page, "#message") == [""]  # the page stopped it, not the server
    go_on.set()


def test_a_broken_file_shows_a_sentence_and_the_question_stays(page):
    page.evaluate('addFiles([new File(["no image"], "cut.png")])')
    page.wait_for("pending.length")
    press_ask(page, "And this?")
    assert shown(page, "#message") == [
        "Image cut.png cannot be opened: its format is none of JPEG, PNG, GIF, WEBP, BMP, TIFF, PPM."
    ]
    assert page.evaluate('find("question").value') == "And this?"
    assert shown(page, "#pending figcaption") == ["cut.png"]
    page.evaluate('document.querySelector("#pending button").click()')
    page.evaluate(f'addFiles([new File([new Uint8Array({MAX_BYTES})], "large.png")])')
    assert shown(page, "#message") == ["large.png does not fit: a conversation has at most 20 MiB with its images."]
    assert page.evaluate("pending.length") == 0


def test_a_thousand_quick_clicks_leave_it_working(server, page):
    page.errors.clear()
    for start in range(0, 1000, 50):  # answers begin and stop in between
        page.evaluate(f"""(() => {{
            for (let i = {start}; i < {start} + 50; i++) {{
                const buttons = [...document.querySelectorAll("button:not(#add)")];  // that opens a dialog
                find("question").value ||= "What?";
                buttons[(i * 48271) % buttons.length].click();
            }}
        }})()""")
    page.evaluate("stop()")
    page.wait_for('!document.body.classList.contains("busy")')
    page.evaluate('find("reset").click(); pending = []; find("question").value = ""')
    press_ask(page, "What?")
    assert len(shown(page, ".answer")) == 1
    assert "16 tokens per image" in shown(page, ".answer .soft")[0]
    assert page.errors == []
    server.queue.wait_until_empty()
    assert server.queue._requests == []
