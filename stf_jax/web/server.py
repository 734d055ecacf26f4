"""Serves a page to try a model, to this machine alone: the page, what it offers, and answers as they are decoded.

The page keeps the conversation and sends all of it with each question, so the server keeps only compiled programs. It
answers at three addresses, none of which names a file: ``/`` is the page, ``/model`` says what the model offers, and
``/answer`` takes a conversation and returns lines of JSON until it closes the connection:

- ``{"ahead": N}``: N requests come first; 0 when the answer begins.
- ``{"text": …}``: the next piece of the answer.
- ``{"done": true, …}``: the answer is complete, with what it cost; or ``{"error": …}``.

Whoever closes the connection stops its answer at the next token.
"""

import base64
import binascii
import contextlib
import dataclasses
import functools
import http
import http.server
import importlib.resources
import io
import json
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.monitoring

from stf_jax.config import UserError
from stf_jax.data.image import open_image
from stf_jax.data.records import IMAGE_MARK, Record, Turn, make_question
from stf_jax.data.tiles import Tiles, check_tiles
from stf_jax.evals.benchmarks.scenes import HeldOutQuestion, held_out_questions
from stf_jax.files import parse_json
from stf_jax.inference.decoding import Sampling
from stf_jax.inference.generator import NO_VISION_MESSAGE, Generator
from stf_jax.models.reducers.base import REDUCERS
from stf_jax.models.spec import ModelSpec

HOST = "127.0.0.1"
MAX_BYTES = 20 * 2**20  # of a request: a conversation with its images in base64
_SHARES = (2, 4, 9, 16, 36)  # a budget is one of these parts of the model's image tokens
_PROGRAMS = 8  # methods whose compiled programs are kept
_PATIENCE = 30  # seconds without a byte of a request, or for the last answer when the server closes
_EACH = 8  # questions of a kind among which one has an image that no other kind has
_PAGE = importlib.resources.files("stf_jax.web").joinpath("page.html")
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def list_methods(model: ModelSpec, tiles: Tiles | None = None) -> dict[str, list[int]]:
    """Lists the budgets of each reducer that fits a model, by its name: that of the model first, "" for none.

    Without a reducer they are those that the model was trained with. ``tiles``: those that the model reads.
    """
    current, base = model.reduction, dataclasses.replace(model, reduce="", keep=0, tokens=0)
    tokens = base.reduction.tokens
    methods = {"": list(model.fusion.budgets) or [tokens]}
    names = dict.fromkeys([*filter(None, [model.reduce]), *REDUCERS.known]) if tokens else {}
    for name in names:
        budgets = {tokens // share for share in _SHARES} | ({current.keep} if name == current.name else set())
        for keep in sorted(budgets - {0}, reverse=True):
            with contextlib.suppress(UserError):  # it does not fit
                reduced = dataclasses.replace(base, reduce=name, keep=keep)
                assert reduced.reduction
                check_tiles(tiles, reduced)
                methods.setdefault(name, []).append(keep)
    return methods


class Server(http.server.ThreadingHTTPServer):
    """A server of one model, which answers one request after another; ``with`` closes it.

    Attributes:
      url: where a browser finds the page.
    """

    def __init__(self, generator: Generator, name: str, limit: int, sampling: Sampling, port: int = 0) -> None:
        """Starts to listen.

        Args:
          generator: of the model as it was loaded; it answers until another method is chosen.
          name: of the model, for the page.
          limit: maximum number of new tokens per answer.
          sampling: of the answers.
          port: 0 means any that is free.

        Raises:
          UserError: the port is taken or not allowed.
        """
        self.queue, self.stopping = _Queue(), threading.Event()
        model, self._limit, self._sampling = generator.model, limit, sampling
        self._methods, chosen = list_methods(model, generator.tiles), (model.reduce, model.reduction.keep)
        self._has_vision = generator.slots > 0

        @functools.lru_cache(_PROGRAMS)
        def find_generator(reduce: str, keep: int) -> Generator:
            if (reduce, keep) == chosen:
                return generator
            return generator.with_reduction(reduce, keep) if reduce else generator.with_reduction("", 0, keep)

        self._find_generator = find_generator
        self.about = {
            "name": name,
            "fusion": model.fusion.fusion if self._has_vision else "",
            "methods": [{"name": name, "budgets": budgets} for name, budgets in self._methods.items()],
            "reduce": model.reduce,
            "keep": model.reduction.keep,
            "maxBytes": MAX_BYTES,
            "samples": _samples() if self._has_vision else [],
        }
        self._compiled = 0  # programs, since the start
        jax.monitoring.register_event_duration_secs_listener(self._count_programs)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"Port {port} of {HOST} cannot be used: {error.strerror}; choose another --port.") from None
        self.url = f"http://{HOST}:{self.server_port}/"

    def _count_programs(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._compiled += event == "/jax/core/compile/backend_compile_duration"

    def answer(self, body: bytes, send: Callable[[dict[str, Any]], None]) -> None:
        """Answers a request, whose lines it sends. Raises UserError for one that cannot be answered."""
        record, reduce, keep = _parse_request(body, self._methods, self._has_vision)
        with self.queue.turn(lambda ahead: send({"ahead": ahead})):
            start, compiled = time.monotonic(), self._compiled
            generator = self._find_generator(reduce, keep)
            generator.prompt(record)  # an error in it comes before the first line
            send({"ahead": 0})
            for _ in generator.generate([record], self._limit, 1, self._sampling, lambda _, text: send({"text": text})):
                pass
            reduction, llm = generator.model.reduction, generator.model.llm_shape
            assert llm is not None  # it answers
            send({
                "done": True,
                "tokens": round(reduction.average_tokens(llm.layers), 1),
                "varies": bool(reduction.stages),
                "milliseconds": round(1000 * (time.monotonic() - start)),
                "compiled": self._compiled > compiled,
            })  # fmt: skip

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints the traceback of a bug; a client that has left is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Stops the answers at their next token, and frees the port."""
        self.stopping.set()
        super().server_close()
        self.queue.wait_until_empty()
        jax.monitoring.unregister_event_duration_listener(self._count_programs)


class _Queue:
    """The requests that wait for the model, in order."""

    def __init__(self) -> None:
        self._requests, self._moved = list[object](), threading.Condition()

    @contextlib.contextmanager
    def turn(self, report: Callable[[int], None]) -> Iterator[None]:
        """Waits for all requests before this one; ``report`` gets their number each second, and may raise to leave."""
        request = object()
        with self._moved:
            self._requests.append(request)
        try:
            while ahead := self._requests.index(request):
                report(ahead)
                with self._moved:
                    if self._requests.index(request) == ahead:
                        self._moved.wait(timeout=1)
            yield
        finally:
            with self._moved:
                self._requests.remove(request)
                self._moved.notify_all()

    def wait_until_empty(self) -> None:
        """Waits for the last request to end, but not forever: a program may take minutes to compile."""
        with self._moved:
            self._moved.wait_for(lambda: not self._requests, timeout=_PATIENCE)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Handles one request, then closes the connection."""

    server: Server
    timeout = _PATIENCE
    _started = False  # whether the answer's first line is sent

    def do_GET(self) -> None:
        if not self._is_for_us():
            return
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", _PAGE.read_bytes())
        elif self.path == "/model":
            self._send(200, "application/json", json.dumps(self.server.about).encode())
        else:
            self._refuse(404, "There is nothing at this address.")

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            self._refuse(403, "Only the page of this server may ask.")
        elif self.path != "/answer":
            self._refuse(404, "There is nothing at this address.")
        elif not (length.isascii() and length.isdecimal()):
            self._refuse(411, "The request does not say how long it is.")
        elif len(length) > 15 or int(length) > MAX_BYTES:
            self._refuse(413, f"The conversation has over {MAX_BYTES >> 20} MiB with its images: use smaller ones.")
            self._read_on()
        else:
            body = self.rfile.read(int(length))
            try:
                self.server.answer(body, self._send_line)
            except UserError as error:
                if self._started:
                    self._send_line({"error": str(error)})
                else:
                    self._refuse(400, str(error))

    def _is_for_us(self) -> bool:
        """Refuses other names for this machine: a page elsewhere may have pointed its own name at it."""
        name = self.headers.get("Host", "").rpartition(":")[0]  # the port may be that of a tunnel
        if name in (HOST, "localhost"):
            return True
        self._refuse(403, f"Open this page as {self.server.url}")
        return False

    def _send_line(self, line: Mapping[str, Any]) -> None:
        """Sends a line of an answer. Raises ConnectionError if the client has left or the server is closing."""
        left = select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK)
        if left or self.server.stopping.is_set():
            raise ConnectionAbortedError
        if not self._started:
            self._send(200, "application/x-ndjson")
            self._started = True
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, "application/json", json.dumps({"error": message}).encode())

    def _send(self, status: int, kind: str, content: bytes = b"") -> None:
        self.send_response(http.HTTPStatus(status))
        for name, value in (
            ("Content-Type", kind),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _read_on(self) -> None:
        """Reads what a refused client still sends for a second: closing earlier could lose the refusal."""
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 1
        while time.monotonic() < end and select.select([self.connection], [], [], 0.2)[0] and self.rfile.read1():
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing for a request."""


def _parse_request(body: bytes, methods: Mapping[str, Sequence[int]], has_vision: bool) -> tuple[Record, str, int]:
    """The conversation in a request, the name of its reducer, and the budget.

    ``{"turns": [{"question": …, "images": [{"name": …, "data": base64}, …], "answer": …}, …], "reduce": …, "keep": …}``
    holds it. The answer of the last turn is ignored.

    Raises:
      UserError: it is no conversation, an image cannot be opened, or the method is not one of ``methods``.
    """
    try:
        value = parse_json(body)
    except ValueError:
        value = None
    match value:
        case {"turns": [_, *_] as rows, "reduce": str(reduce), "keep": int(keep)}:
            pass
        case _:
            raise UserError("The request is not a conversation in JSON.")
    if keep not in methods.get(reduce, ()):
        raise UserError("The request names a method that the page does not offer for this model.")
    images, turns = list[Callable[[], Any]](), list[Turn]()
    for row in rows:
        match row:
            case {"question": str(question), "images": list(files), "answer": str(answer)}:
                asked = make_question("", [_parse_image(file, has_vision) for file in files], question)
            case _:
                raise UserError("A turn of the conversation lacks a question, images or an answer.")
        images += asked.images
        turns += *asked.turns, Turn("gpt", answer.replace(IMAGE_MARK, ""))
    if not question.strip():
        raise UserError("The question is empty.")
    return Record("conversation", tuple(images), tuple(turns[:-1])), reduce, keep


def _parse_image(file: Any, has_vision: bool) -> Callable[[], Any]:
    """A function that opens an image of a request; it was opened once, to see that it can be."""
    if not has_vision:
        raise UserError(f"This image cannot be used: {NO_VISION_MESSAGE}")
    match file:
        case {"name": str(name), "data": str(data)}:
            pass
        case _:
            raise UserError("An image of the conversation lacks a name or data.")
    try:
        content = base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        raise UserError("An image of the conversation is not in base64.") from None
    open_image(content, name)  # and forgets it: a few bytes may become many pixels
    return functools.partial(open_image, content, name)


@functools.cache
def _samples() -> list[dict[str, str]]:
    """A question of each kind of ``scenes``, each with another of its held-out images."""
    chosen: dict[str, HeldOutQuestion] = {}
    for item in held_out_questions(_EACH):
        if item.question.kind not in chosen and item.index not in {other.index for other in chosen.values()}:
            chosen[item.question.kind] = item
    samples = []
    for kind, item in chosen.items():
        file = io.BytesIO()
        item.image().save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        samples.append({"name": f"{kind}.png", "data": data, "question": item.question.text})
    return samples
