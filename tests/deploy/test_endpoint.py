"""The check of a running server: what it does wrong is found and named."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from conftest import WIDTH
from mipic_st import check_endpoint, cli

TEXTS = ["the old man plays guitar", "a dog", "two small children see the red house near the river"]


def with_pooling(model, mode):
    """The model with another pooling."""
    model[1] = Pooling(WIDTH, mode)
    return model


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
        (lambda m, t, d: unit(m.encode(t)), 8, ["it gives 32 values where 8 were asked for: cut and normalise them"]),
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
        (lambda m, t, d: unit(m.encode(t)[:, ::-1]), None, ["its vectors are others than the model's, by "]),
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
    with pytest.raises(ValueError, match="dim"):
        check_endpoint(model, "http://127.0.0.1:9", dim=64)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        check_endpoint(model, "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="refuses the request with status 400"):
        check_endpoint(model, serve(lambda texts, dim: model.encode(texts), status=400))
    with pytest.raises(ConnectionError, match=r"status 404: .*; if its route is another one, give it whole"):
        check_endpoint(model, serve(lambda texts, dim: model.encode(texts), status=404))
    with pytest.raises(ConnectionError, match="cannot be reached: nonnumeric port"):
        check_endpoint(model, "http://127.0.0.1:port")
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
    assert "its vectors are others than the model's" in capsys.readouterr().err
