"""Invariants of the store: a view answers as the model's own method would, whatever the call gives, or refuses."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Module, Normalize, Pooling, Router, Transformer

from conftest import WIDTH, assemble, sentences
from evaluation_fixtures import CountingModel
from mipic_st.evaluation import store as embedding_store
from mipic_st.evaluation import vectors as _vectors
from mipic_st.evaluation.store import EmbeddingStore

TEXTS = [*sentences(10, 1), *sentences(4, 2, shortest=30, longest=40), ""]
PROMPTS = {"query": "the cat ", "document": "a dog ", "other": "blue "}


class TaskScale(Module):
    """A module of somebody's own that looks at the task in its forward pass."""

    forward_kwargs: ClassVar = {"task"}

    def forward(self, features, task=None, **kwargs):
        factor = {"query": 2.0, "document": 3.0}.get(task, 1.0)
        features["sentence_embedding"] = features["sentence_embedding"] * factor + factor
        return features

    def save(self, output_path, *args, **kwargs):
        raise NotImplementedError


class TaskTransformer(Transformer):
    """A first module that looks at the task while it prepares texts."""

    def preprocess(self, inputs, prompt=None, **kwargs):
        words = {"query": "house ", "document": "train "}.get(kwargs.get("task"), "")
        return super().preprocess([words + text for text in inputs], prompt=prompt, **kwargs)


class OwnRouter(Router):
    """Not named Router."""


class OwnModel(SentenceTransformer):
    """Another query method, with an argument of its own, behind the same names."""

    def encode_query(self, inputs, prompt_name=None, prompt=None, batch_size=32, *, tone="calm", **kwargs):
        inputs = [f"{tone} {text}" for text in ([inputs] if isinstance(inputs, str) else inputs)]
        return 2 * super().encode_query(inputs, prompt_name=prompt_name, prompt=prompt, batch_size=batch_size, **kwargs)


def dense(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Dense(WIDTH, WIDTH, activation_function=torch.nn.Identity())


def build(kind, transformer_folder, **options):
    folder = str(transformer_folder("bert"))
    options = {"device": "cpu", "prompts": dict(PROMPTS), **options}
    if kind == "query_length":
        first = Transformer(folder, query_length=5, document_length=9)
    elif kind == "own first module":
        first = TaskTransformer(folder)
    else:
        first = Transformer(folder)
    if kind == "chat template":
        first.tokenizer.chat_template = (
            "{% for m in messages %}{% if task == 'query' %}red {% endif %}{{ m['content'] }} {% endfor %}"
        )
        first.modality_config = {
            "message": {"method": "forward", "method_output_name": "last_hidden_state", "format": "flat"},
            **first.modality_config,
        }
    modules = [first, Pooling(WIDTH, "mean"), Normalize()]
    if kind == "forward task":
        modules.append(TaskScale())
    if kind in ("router", "own router"):
        router = {"router": Router, "own router": OwnRouter}[kind]
        modules.insert(2, router.for_query_document([dense(1)], [dense(2)]))
    if kind == "router first":
        modules = [
            Router.for_query_document([first, Pooling(WIDTH, "mean")], [Transformer(folder), Pooling(WIDTH, "cls")])
        ]
    model_class = OwnModel if kind == "own model" else SentenceTransformer
    return model_class(modules=modules, **options).eval()


KINDS = [
    "plain",
    "query_length",
    "own first module",
    "chat template",
    "forward task",
    "router",
    "own router",
    "router first",
    "own model",
]
CALLS = [
    ("encode", (), {}),
    ("encode_query", (), {}),
    ("encode_document", (), {}),
    ("encode", (), {"task": "query"}),
    ("encode", (), {"task": "document"}),
    ("encode", (), {"prompt_name": "query", "task": "query"}),
    ("encode_query", (), {"prompt": "small "}),
    ("encode_query", (), {"prompt": ""}),
    ("encode_document", ("other",), {}),
    ("encode_query", (None, "large ", 3, False), {}),
    ("encode", (None, None, 4, False, "sentence_embedding", "float32", True, False, "cpu", True), {}),
    ("encode", (), {"processing_kwargs": {"text": {"max_length": 6, "truncation": True}}}),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_answers_every_call_as_the_model_does(kind, transformer_folder):
    """Task, prompts, positional and further arguments: one store, all calls after each other, equal at full width."""
    model = build(kind, transformer_folder)
    view = EmbeddingStore(model).view(WIDTH)
    for _ in range(2):  # the second round is answered from the store
        for method, args, options in CALLS:
            if kind == "own model" and len(args) > 3:
                continue  # its query method takes three by position
            expected = getattr(model, method)(TEXTS, *args, **options)
            got = getattr(view, method)(TEXTS, *args, **options)
            np.testing.assert_allclose(got, expected, atol=2e-6, err_msg=f"{method} {args} {options}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_these_models_do_tell_tasks_apart(kind, transformer_folder):
    """The equality above would hold for a store that drops the task, if the task changed nothing."""
    model = build(kind, transformer_folder, prompts={})
    assert np.abs(model.encode_query(TEXTS) - model.encode_document(TEXTS)).max() > 1e-3


def test_arguments_of_a_models_own_method_arrive(transformer_folder):
    """Also those that sentence-transformers does not know, and other values of them are other vectors."""
    model = build("own model", transformer_folder)
    view = EmbeddingStore(model).view(WIDTH)
    for tone in ("red", "blue"):
        got = view.encode_query(TEXTS, tone=tone)
        np.testing.assert_allclose(got, model.encode_query(TEXTS, tone=tone), atol=2e-6)


def test_an_argument_that_the_model_does_not_know_is_its_own_error(transformer_folder):
    """As without a store, also when all texts are stored."""
    model = build("plain", transformer_folder)
    view = EmbeddingStore(model).view(WIDTH)
    view.encode(TEXTS)
    for bad, message in (({"tusk": "query"}, "tusk"), ({"prompt_name": "nothing"}, "nothing")):
        with pytest.raises(ValueError, match=message):
            view.encode(TEXTS, **bad)


def test_further_arguments_are_encoded_each_time(transformer_folder, monkeypatch):
    """Whatever they are: nothing is looked up by them, and the plain call's vectors stay its own."""
    model = build("plain", transformer_folder)
    original = SentenceTransformer.encode

    def encode(self, inputs, *args, mark=None, **kwargs):
        return original(self, inputs, *args, **kwargs) + (0 if mark is None else float(mark[5000]))

    monkeypatch.setattr(SentenceTransformer, "encode", encode)
    store = EmbeddingStore(model)
    view = store.view(WIDTH, normalize=False)
    first, second = np.zeros(10_000), bytearray(10_000)
    second[5000] = 1
    for _ in range(2):
        plain = view.encode(["cat", "dog", "cat"])
        np.testing.assert_allclose(view.encode(["cat", "dog", "cat"], mark=first), plain)
        np.testing.assert_allclose(view.encode(["cat", "dog", "cat"], mark=second), plain + 1)
    assert len(store) == 2 + 2 * 2, "what a mark of 0 gives is there"


def test_int8_knows_the_texts_of_calls_with_further_arguments(transformer_folder):
    """They are stored, too, if not looked up."""
    store = EmbeddingStore(build("plain", transformer_folder))
    expected = store.view(8).encode(TEXTS, task="query")
    store.calibrate()
    codes = store.view(8, precision="int8").encode(TEXTS, task="query")
    steps = (expected.max(axis=0) - expected.min(axis=0)) / 255
    np.testing.assert_allclose(codes, np.floor((expected - expected.min(axis=0)) / steps) - 128, atol=1)


def test_int8_does_not_notice_that_a_text_has_two_methods(transformer_folder):
    """Encoded in another batch, a vector's last bits are others, and a range of them would give another code."""
    model = build("plain", transformer_folder, prompts={})
    codes = []
    for again in (False, True):
        store = EmbeddingStore(model)
        store.view(WIDTH).encode(TEXTS)
        if again:
            for text in TEXTS:
                store.view(WIDTH).encode_query([text])
        store.calibrate()
        assert len(store) == len(TEXTS)
        codes.append(store.view(WIDTH, precision="int8").encode(TEXTS))
    np.testing.assert_array_equal(*codes)


def test_each_method_and_prompt_has_its_own_vectors(transformer_folder, monkeypatch):
    """A text that is query and document is encoded twice; what is there is not encoded again."""
    model = build("plain", transformer_folder)
    counted = CountingModel(model, monkeypatch)
    store = EmbeddingStore(model)
    view = store.view(8)
    for _ in range(2):
        for method in ("encode", "encode_query", "encode_document"):
            getattr(view, method)(TEXTS)
        view.encode(TEXTS, prompt_name="other")
        view.encode(TEXTS, prompt=PROMPTS["query"], batch_size=3)
        assert len(counted.texts) == 5 * len(TEXTS)
        assert len(store) == 4 * len(TEXTS), "the last one gives the vectors of encode_query"
    model.prompts["query"] = "a house "
    np.testing.assert_allclose(store.view(WIDTH).encode_query(TEXTS), model.encode_query(TEXTS), atol=2e-6)


def test_a_method_set_on_the_instance_is_the_one_that_encodes(transformer_folder):
    """With every one of its arguments, in any order, with and without layers that could follow it."""
    model = build("plain", transformer_folder)
    original = model.encode

    def shout(inputs, *args, **kwargs):
        return original([text.upper() + " house" for text in inputs], *args, **kwargs)

    model.encode = shout
    view = EmbeddingStore(model).view(WIDTH)
    for method in ("encode", "encode_query"):
        got = getattr(view, method)(TEXTS, None, "blue ", batch_size=4)
        np.testing.assert_allclose(got, getattr(model, method)(TEXTS, None, "blue "), atol=2e-6)
    with pytest.raises(ValueError, match=r"not what encode gives for it.*leave layers out"):
        EmbeddingStore(model, [1, 3]).view(8, layer=3).encode(TEXTS)


def in_threads(count, run):
    """Run a function in several threads at once; what each returned."""
    start, results = threading.Barrier(count), [None] * count

    def one(number):
        start.wait()
        results[number] = run(number)

    workers = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


@pytest.mark.parametrize("limit", [0, None])
def test_threads_that_share_a_store_get_their_own_texts(limit, small_blocks, transformer_folder):
    """Each text keeps its vector, whoever encoded it first, in memory and in a file."""
    model = build("plain", transformer_folder)
    texts = [f"{a} {b}" for a in TEXTS[:8] for b in TEXTS[:8]]
    expected = dict(zip(texts, model.encode(texts), strict=True))
    for _ in range(4):
        view = EmbeddingStore(model, memory_limit=limit).view(WIDTH)
        for number, found in enumerate(in_threads(4, lambda n, view=view: view.encode(texts[n::2], batch_size=7))):
            np.testing.assert_allclose(found, [expected[text] for text in texts[number::2]], atol=1e-5)


def test_a_store_that_is_cleared_meanwhile_mixes_no_texts_up(transformer_folder):
    """Rows of what was forgotten are not those of what came later."""
    model = build("plain", transformer_folder)
    store, expected = EmbeddingStore(model), dict(zip(TEXTS, model.encode(TEXTS), strict=True))

    def encode_or_clear(number):
        for turn in range(30):
            texts = TEXTS[number + turn % 3 :: 2]
            if number == 3:
                store.clear()
            else:
                found = store.view(WIDTH).encode(texts)
                np.testing.assert_allclose(found, [expected[text] for text in texts], atol=1e-5)
        return True

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert in_threads(4, encode_or_clear) == [True] * 4
    finally:
        sys.setswitchinterval(before)


def test_stores_with_layers_share_a_model_in_threads(transformer_folder):
    """Flags and modes are set on the model by one at a time, and are as before in the end."""
    model = build("plain", transformer_folder)
    expected = EmbeddingStore(model, [1, 3]).view(WIDTH, layer=1).encode(TEXTS)
    model.train()
    for _ in range(4):
        found = in_threads(4, lambda n: EmbeddingStore(model, [1, 3]).view(WIDTH, layer=1).encode(TEXTS))
        for vectors in found:
            np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert not model[0].auto_model.config.output_hidden_states
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
@pytest.mark.parametrize("kind", ["plain", "query_length", "own first module", "chat template"])
def test_the_grid_follows_prompts_and_tasks(kind, method, transformer_folder):
    """The last layer's cell is the model's own vector, whichever method is asked; training mode stays."""
    model = build(kind, transformer_folder)
    expected = getattr(model, method)(TEXTS)
    model.train()
    got = getattr(EmbeddingStore(model, [1, 3]).view(WIDTH, layer=3), method)(TEXTS)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["forward task", "router", "own router", "own model"])
def test_the_grid_refuses_what_it_cannot_follow(kind, transformer_folder):
    """A task in the forward pass, a method that does more: no number rather than another model's."""
    model = build(kind, transformer_folder)
    view = EmbeddingStore(model, [1, 3]).view(WIDTH, layer=3)
    with pytest.raises((ValueError, TypeError), match="leave layers out"):
        view.encode_query(TEXTS)


def test_the_grid_refuses_several_processes(transformer_folder):
    """Layers are encoded here; a list of devices is not dropped in silence."""
    model = build("plain", transformer_folder)
    with pytest.raises(ValueError, match="no list and no pool"):
        EmbeddingStore(model, [1], device=["cpu", "cpu"])
    with pytest.raises(ValueError, match="no list and no pool"):
        EmbeddingStore(model, [1]).view(8, layer=1).encode(TEXTS, device=["cpu", "cpu"])


@pytest.mark.parametrize("dim", [8, WIDTH])
def test_the_view_says_its_dim(dim, transformer_folder):
    """Whoever asks a view for its width gets that of its vectors."""
    view = EmbeddingStore(build("plain", transformer_folder, truncate_dim=5)).view(dim)
    assert view.get_embedding_dimension() == view.get_sentence_embedding_dimension() == view.truncate_dim == dim
    assert view.encode(["cat"]).shape == (1, dim)
    assert view.encode("cat").shape == (dim,)
    assert view.evaluate(lambda model, path: model.truncate_dim) == dim


def test_what_has_no_dim_is_refused(transformer_folder):
    """Every way to vectors of another width, and every change that the store would not notice."""

    class Images(SentenceTransformer):
        def encode_image(self, inputs):
            return self.encode(inputs)

    model = Images(modules=list(build("plain", transformer_folder).children()), device="cpu")
    view = EmbeddingStore(model).view(8)
    for name in ("forward", "truncate_embeddings", "encode_image", "_inference"):
        with pytest.raises(TypeError, match=name):
            getattr(view, name)
    for name, value in (("max_seq_length", 4), ("prompts", {}), ("truncate_dim", 4)):
        with pytest.raises(AttributeError, match=name):
            setattr(view, name, value)
    with pytest.raises(TypeError, match="texts only, got an input of dict"):
        view.encode({"text": "cat"})
    assert view.max_seq_length == model.max_seq_length


@pytest.mark.parametrize("options", [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}])
@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_no_texts_give_no_vectors(precision, options, transformer_folder):
    """An empty set of texts is no error at any precision, in any container."""
    store = EmbeddingStore(build("plain", transformer_folder))
    store.calibrate()
    for asked in ({}, {"precision": "int8"} if precision == "float32" else {}):
        assert len(store.view(8, precision=precision).encode([], **options, **asked)) == 0


def test_int8_depends_on_the_declared_texts_only(transformer_folder):
    """Calibrated on what was there when it was declared, whatever came before in other order, and refused before."""
    model = build("plain", transformer_folder)
    views = []
    for order in (TEXTS, TEXTS[::-1]):
        store = EmbeddingStore(model)
        with pytest.raises(ValueError, match="int8 has no calibration texts"):
            store.view(8, precision="int8").encode(TEXTS[:3])
        store.view(WIDTH).encode(order)
        store.calibrate()
        store.view(WIDTH).encode(sentences(40, 9))
        views.append(store.view(8, precision="int8").encode(TEXTS))
    np.testing.assert_array_equal(*views)
    full = model.encode(TEXTS)[:, :8]
    full /= np.linalg.norm(full, axis=1, keepdims=True)
    steps = (full.max(axis=0) - full.min(axis=0)) / 255
    np.testing.assert_array_equal(views[0], np.clip(np.floor((full - full.min(axis=0)) / steps), 0, 255) - 128)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four vectors and portions of six, so that few texts cross their borders."""
    monkeypatch.setattr(_vectors, "_BLOCK_BYTES", 4 * 4 * WIDTH)
    monkeypatch.setattr(embedding_store, "_PORTION_BYTES", 6 * 4 * WIDTH)


@pytest.mark.parametrize("limit", [0, 700, 10_000, None])
@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_memory_limit_changes_no_vector(limit, layers, small_blocks, transformer_folder):
    """In memory, moved to a file half-way, in a file from the start: the same vectors, in any order, at any dim."""
    model = build("plain", transformer_folder)
    layer = None if layers is None else 3
    reference = model.encode(TEXTS)
    store = EmbeddingStore(model, layers, memory_limit=limit)
    for texts in (TEXTS[:5], TEXTS, [*TEXTS[::-1], *TEXTS[:3]]):
        expected = reference[[TEXTS.index(text) for text in texts]]
        np.testing.assert_allclose(store.view(WIDTH, layer=layer).encode(texts), expected, atol=1e-5)
        cut = store.view(8, layer=layer, normalize=False).encode(texts)
        np.testing.assert_allclose(cut, expected[:, :8], atol=1e-5)
    assert store.in_file == (limit is not None and limit < 10_000)
    assert store.nbytes == len(TEXTS) * WIDTH * 4 * len(layers or [0])
    store.calibrate()
    ranges = store.ranges(8, layer, False, "int8")
    np.testing.assert_allclose(ranges.low, reference[:, :8].min(axis=0), atol=1e-5)
    np.testing.assert_allclose(ranges.high, reference[:, :8].max(axis=0), atol=1e-5)


def test_a_result_from_a_file_may_be_changed(small_blocks, transformer_folder):
    """What an evaluator does to its vectors stays its own; tensors of them need no warning."""
    view = EmbeddingStore(build("plain", transformer_folder), memory_limit=100).view(8)
    first = view.encode(TEXTS)
    assert isinstance(first, np.memmap)
    first += 1
    np.testing.assert_allclose(first, view.encode(TEXTS) + 1)
    assert torch.equal(view.encode(TEXTS, convert_to_tensor=True), torch.as_tensor(np.array(view.encode(TEXTS))))


def test_files_leave_nothing_behind(small_blocks, transformer_folder, tmp_path, monkeypatch):
    """No name in the folder even while the store lives, no open file after it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    open_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    store = EmbeddingStore(build("plain", transformer_folder), memory_limit=100)
    result = store.view(8).encode(TEXTS)
    assert store.in_file
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), store:
        raise ZeroDivisionError
    assert not store.in_file
    assert len(store) == 0
    del result
    gc.collect()
    if open_files is not None:
        assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_full_disk_is_named(small_blocks, transformer_folder, monkeypatch):
    """The folder and what to do."""

    class Full:
        def seek(self, *args):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

        close = flush = seek

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **kwargs: Full())
    with pytest.raises(OSError, match="TMPDIR"):
        EmbeddingStore(build("plain", transformer_folder), memory_limit=100).view(8).encode(TEXTS)


def test_a_write_that_failed_halfway_can_be_repeated(transformer_folder, monkeypatch):
    """What it left behind must not move the vectors that come after it."""
    model = build("plain", transformer_folder)
    room = [True]
    write = _vectors.write_array

    def partly(file, array):
        if not room[0]:
            file.write(np.ascontiguousarray(array).tobytes()[:200])
            raise OSError(28, "No space left on device")
        write(file, array)

    monkeypatch.setattr(_vectors, "write_array", partly)
    view = EmbeddingStore(model, memory_limit=0).view(WIDTH)
    view.encode(TEXTS[:2])
    room[0] = False
    with pytest.raises(OSError, match="No space"):
        view.encode(TEXTS)
    room[0] = True
    np.testing.assert_allclose(view.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_one_text_is_no_list_of_texts(transformer_folder):
    """Of which each letter would be a text."""
    with pytest.raises(TypeError, match="texts must be a list of texts, got one text"):
        EmbeddingStore(build("plain", transformer_folder)).rows_of("a cat")


@pytest.mark.slow
def test_several_processes_give_the_same_vectors(transformer_folder):
    """A device list of the store, of a call, a pool, and encode_multi_process; started once, stopped, model at home."""
    model = assemble(transformer_folder("bert"))
    expected = model.encode(TEXTS)
    started = []
    start = type(model).start_multi_process_pool
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model), "start_multi_process_pool", lambda *args: started.append(start(*args)) or started[-1]
        )
        with EmbeddingStore(model, device=["cpu", "cpu"]) as store:
            np.testing.assert_allclose(store.view(WIDTH).encode(TEXTS[:9], batch_size=4), expected[:9], atol=1e-5)
            np.testing.assert_allclose(store.view(WIDTH).encode(TEXTS, device=["cpu", "cpu"]), expected, atol=1e-5)
            assert len(started) == 1
            processes = list(started[0]["processes"])
            pooled = EmbeddingStore(model)
            view = pooled.view(WIDTH)
            np.testing.assert_allclose(view.encode_multi_process(TEXTS[:4], started[0]), expected[:4], atol=1e-5)
            np.testing.assert_allclose(view.encode(TEXTS, pool=started[0], chunk_size=2), expected, atol=1e-5)
            pooled.clear()
            assert all(process.is_alive() for process in processes)
    for process in processes:
        with pytest.raises(ValueError, match="process object is closed"):
            process.is_alive()
    assert model.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux gives it")
def test_two_million_texts_take_less_than_two_gigabytes():
    """A corpus of 2 million short texts at 384 values, retrieval at two dims: resident memory at its peak."""
    script = Path(__file__).parents[1] / "large_corpus.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    figures = json.loads(run.stdout)
    assert figures["vectors_mb"] == pytest.approx(2_000_050 * 384 * 4 / 2**20)
    assert figures["peak_mb"] < 2000, figures
