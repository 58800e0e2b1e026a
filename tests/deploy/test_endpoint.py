"""The check of a running server: what it does wrong is found and named."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from conftest import WIDTH
from mipic_st import check_endpoint, cli


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def serve():
    """Starts a server of OpenAI's embeddings route, which answers with what a function gives for (texts, dim)."""
    servers = []

    def start(vectors, status=200):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                start.paths.append(self.path)
                start.asked.append((asked["model"], asked["input"], self.headers["Authorization"]))
                given = vectors(asked["input"], asked.get("dimensions"))
                rows = [{"index": index, "embedding": row.tolist()} for index, row in enumerate(given)]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps({"data": rows[::-1]}).encode())

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    start.paths, start.asked = [], []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def model(tiny_model):
    """A model with a rotation-like Dense before Normalize."""
    return tiny_model(tail="embeddinggemma")


@pytest.mark.parametrize("dim", [None, 8])
def test_a_server_of_the_model_agrees(model, serve, dim):
    """At full width and at a dim that the server cuts and normalizes; the order of the answer does not matter."""
    url = serve(lambda texts, dim: unit(model.encode(texts)[:, :dim]))
    check = check_endpoint(model, url, dim)
    assert check.agrees
    assert not check.findings
    assert check.worst < 1e-5
    assert serve.paths == ["/v1/embeddings"]


def test_every_option_of_the_check_counts(model, serve):
    """Name, key and texts are what the server gets; the tolerance decides."""

    def near(texts, dim):
        noise = np.random.default_rng(0).normal(size=(len(texts), WIDTH)) * 0.01
        return unit(model.encode(texts) + noise)

    url = serve(near)
    texts = ["one text", "and another"]
    loose = check_endpoint(model, url, name="mine", texts=texts, api_key="secret", tolerance=0.5)
    assert serve.asked == [("mine", texts, "Bearer secret")]
    assert loose.agrees
    strict = check_endpoint(model, url, texts=texts, tolerance=1e-4)
    assert not strict.agrees
    assert serve.asked[1] == ("model", texts, None)
    assert strict.worst == loose.worst > 0.01


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"url": 5}, ValueError, "url must begin with http"),
        ({"timeout": "x"}, TypeError, "timeout must be a number"),
        ({"timeout": 0}, ValueError, "timeout must be > 0"),
        ({"tolerance": -1}, ValueError, "tolerance must be > 0"),
        ({"api_key": "schlüssel"}, ValueError, "api_key must be a text of ASCII"),
        ({"api_key": "schluessel\n"}, ValueError, "api_key must be a text of ASCII characters without line ends"),
    ],
)
def test_wrong_options_of_the_check_are_named(model, wrong, error, message):
    """Before the server is asked; the key itself is not shown."""
    with pytest.raises(error, match=message) as caught:
        check_endpoint(model, **({"url": "http://127.0.0.1:9"} | wrong))
    assert "ssel" not in str(caught.value)


@pytest.mark.parametrize(
    ("vectors", "dim", "findings"),
    [
        (
            lambda m, t, d: unit(m.encode(t)),
            8,
            ["it gives 32 dims where 8 were asked for: truncate and normalise them"],
        ),
        (lambda m, t, d: m.encode(t)[:, :d], 8, ["its vectors have lengths from 0."]),
        (
            lambda m, t, d: unit(SentenceTransformer(modules=[m[0], m[1]], device="cpu").encode(t)[:, :d]),
            8,
            ["its vectors are those in front of the Dense layers: the server leaves them out"],
        ),
        (
            lambda m, t, d: unit(SentenceTransformer(modules=[m[0], m[1]], device="cpu").encode(t)),
            None,
            ["its vectors are those in front of the Dense layers: the server leaves them out"],
        ),
        (
            lambda m, t, d: unit(SentenceTransformer(modules=[m[0], Pooling(WIDTH, "cls"), *list(m)[2:]]).encode(t)),
            None,
            ["its vectors are pooled by 'cls' where the model has 'mean': the server does not read the pooling"],
        ),
        (
            lambda m, t, d: unit(SentenceTransformer(modules=[m[0], Pooling(WIDTH, "cls")]).encode(t)[:, :d]),
            8,
            [
                "its vectors are pooled by 'cls' where the model has 'mean': the server does not read the pooling; its "
                "vectors are those in front of the Dense layers: the server leaves them out"
            ],
        ),
        (lambda m, t, d: unit(m.encode(t)[:, ::-1]), None, ["its vectors differ from the model's by "]),
    ],
)
def test_what_a_server_does_wrong_is_found(model, serve, vectors, dim, findings):
    """A dim that is ignored, a missing normalization, Dense or pooling, another space: each by its name."""
    url = serve(lambda texts, dim: vectors(model, texts, dim))
    check = check_endpoint(model, url, dim)
    assert not check.agrees
    assert len(check.findings) == len(findings)
    for found, expected in zip(check.findings, findings, strict=True):
        assert found.startswith(expected)


def test_bad_addresses_and_answers(model, serve):
    """Said in words: no address, nobody there, a refusal, an answer that is none."""
    with pytest.raises(ValueError, match="url must begin with http"):
        check_endpoint(model, "file:///etc/passwd")
    for url in (
        "http://ü.org",
        "http://[::1",
        "http://h:99999",
        "http://",
        "http://a b",
        "http://u:pa55@h",
        None,
        b"http://h",
    ):
        with pytest.raises(ValueError, match="url must begin with http") as error:
            check_endpoint(model, url)
        assert "pa55" not in str(error.value)
    with pytest.raises(ValueError, match="password or query, got 'http://h/v1'"):
        check_endpoint(model, "http://h/v1?key=secret")
    with pytest.raises(ValueError, match="timeout must be > 0 and <="):
        check_endpoint(model, "http://127.0.0.1:1", timeout=1e20)
    with pytest.raises(ValueError, match="dim"):
        check_endpoint(model, "http://127.0.0.1:9", dim=64)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        check_endpoint(model, "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="refuses the request with status 400"):
        check_endpoint(model, serve(lambda texts, dim: model.encode(texts), status=400))
    with pytest.raises(ConnectionError, match=r"status 404: .*; if its route is another one, give it whole"):
        check_endpoint(model, serve(lambda texts, dim: model.encode(texts), status=404))
    with pytest.raises(ValueError, match="answers 3 texts with an array of shape"):
        check_endpoint(model, serve(lambda texts, dim: model.encode(texts)[:1]))
    with pytest.raises(TypeError, match="texts must be a list of texts, got one text"):
        check_endpoint(model, "http://127.0.0.1:1", texts="hello")


def test_a_server_of_another_protocol_is_no_crash(model):
    """What answers without a word of HTTP is an error of the connection too."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail ready\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionError, match="cannot be reached"):
            check_endpoint(model, f"http://127.0.0.1:{server.getsockname()[1]}", timeout=10)


def test_a_server_that_is_silent_runs_out_of_time(model):
    """The time to wait is the caller's."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ConnectionError, match="cannot be reached: timed out"),
    ):
        check_endpoint(model, f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.2)


@pytest.fixture
def raw():
    """Starts a server that answers with bytes; it notes what it was sent."""
    servers = []

    def start(answer):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def run():
            try:
                while True:
                    connection, _ = server.accept()
                    with connection:
                        start.sent.append(connection.recv(65536))
                        answer(connection)
                        while connection.recv(65536):  # what is left unread would reset the connection
                            pass
            except OSError:  # closed, by the test or by the one who asked
                pass

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    start.sent = []
    yield start
    for server in servers:
        server.close()


def answering(status, body=b"", **headers):
    """An answer of HTTP, whole."""
    lines = [f"HTTP/1.1 {status} words", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return lambda connection: connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_goes_to_the_given_address_only(model, raw, status):
    """Another host would get it with a redirect, and the server's address is the caller's choice in any case."""
    other = raw(answering(200))
    url = raw(answering(status, Location=f"{other}/v1/embeddings"))
    with pytest.raises(ConnectionError, match=f"sends the request on to '{other}/v1/embeddings' .status {status}"):
        check_endpoint(model, url, api_key="secret")
    assert len(raw.sent) == 1
    assert b"Bearer secret" in raw.sent[0]


def test_a_proxy_does_not_get_the_key(model, raw, monkeypatch):
    """What is sent by http, it would read; through one for https it goes unread."""
    monkeypatch.setenv("http_proxy", raw(answering(500, b"the proxy")))
    with pytest.raises(ConnectionError, match="status 500: the server"):
        check_endpoint(model, raw(answering(500, b"the server")), api_key="secret")
    assert len(raw.sent) == 1


def drip(connection):
    """Headers that never end, a letter every now and then."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(200):
        connection.sendall(b"x")
        time.sleep(0.05)


def drip_body(connection):
    """A body that never ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(200):
        connection.sendall(b" ")
        time.sleep(0.05)


def stall_with_an_error(connection):
    """The body of a status 500 that does not come."""
    connection.sendall(b"HTTP/1.1 500 no\r\nContent-Length: 100\r\n\r\n")
    time.sleep(3)


@pytest.mark.parametrize("answer", [drip, drip_body, stall_with_an_error])
def test_the_time_is_that_of_the_whole_answer(model, raw, answer):
    """A socket's own timeout begins again with each byte."""
    begin = time.perf_counter()
    with pytest.raises(ConnectionError, match="cannot be reached: timed out"):
        check_endpoint(model, raw(answer), timeout=0.5)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (b"[" * 100_000, ValueError, "answers with something else"),
        (b'{"data": [1]}', ValueError, "answers with something else"),
        (b" " * (2**20 + 1), ConnectionError, "it sends more than 1 million bytes"),
    ],
)
def test_answers_without_measure_are_errors_in_words(model, raw, body, error, message):
    """Deep or endless JSON."""
    with pytest.raises(error, match=message):
        check_endpoint(model, raw(answering(200, body)), texts=["one"])


def test_what_a_server_says_does_not_reach_the_terminal_raw(model, raw):
    """Its escape sequences could move the cursor and hide what is said."""
    with pytest.raises(ConnectionError, match="status 400") as caught:
        check_endpoint(model, raw(answering(400, b"\x1b[2J\x1b[1;1H all good \x9b")))
    assert str(caught.value).isprintable()


def test_a_prompt_that_the_server_adds_is_named(model, serve):
    """The model's default one, or another of its own."""
    model.prompts, model.default_prompt_name = {"query": "", "all": "book "}, "all"
    check = check_endpoint(model, serve(lambda texts, dim: unit(model.encode(texts))))
    assert [finding.partition(":")[0] for finding in check.findings] == [
        "its vectors are those of texts with the model's prompt 'all' in front, 'book '"
    ]


def test_what_is_no_model_is_named(model, serve):
    """A name or a CrossEncoder; a compiled model is one."""
    for wrong in ("name", nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model must be a SentenceTransformer, or one wrapped for training, got"):
            check_endpoint(wrong, "http://127.0.0.1:9")
    compiled = torch.compile(model)
    assert check_endpoint(compiled, serve(lambda texts, dim: unit(model.encode(texts)))).agrees


def test_commands(model, serve, tmp_path, capsys):
    """Save in the server's form, check a right server and a wrong one."""
    model.save_pretrained(str(tmp_path / "model"))
    place = str(tmp_path / "model")
    assert cli.main(["export", place, "--format", "tei", "--output", str(tmp_path / "tei")]) == 0
    assert "sentence_transformers.models.Dense" in (tmp_path / "tei" / "modules.json").read_text()
    url = serve(lambda texts, dim: unit(model.encode(texts)[:, :dim]))
    assert cli.main(["check", place, "--url", url, "--dim", "8"]) == 0
    assert "gives the model's vectors" in capsys.readouterr().out
    url = serve(lambda texts, dim: model.encode(texts)[:, ::-1])
    assert cli.main(["check", place, "--url", url]) == 1
    assert "its vectors differ from the model's" in capsys.readouterr().err
