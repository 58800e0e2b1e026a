"""Two gloo processes under torchrun against one process on the concatenated batch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from conftest import DEPTH, column_features, total
from distributed_worker import EQUAL, SHARDS, WITHOUT_PROJECTIONS, run_by_hand, run_drift, run_equal, run_taught
from mipic_st import MIPICCallback, MIPICLoss
from mipic_st.losses import callback, pic
from training_fixtures import make_loss, make_trainer, parameters

HERE = Path(__file__).parents[1]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def start(tmp_path_factory, transformer_folder):
    """A model without dropout, so that one process and two can be compared."""
    transformer = Transformer(str(transformer_folder("bert", **NO_DROPOUT)))
    folder = tmp_path_factory.mktemp("start")
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(start, tmp_path_factory):
    """Parameters after each scenario, per rank: one start-up of two processes serves all of them."""
    output = tmp_path_factory.mktemp("ranks")
    finish(torchrun(["--standalone", "--nproc-per-node=2"], [start, output]))
    return [torch.load(output / f"rank{rank}.pt") for rank in (0, 1)]


def torchrun(options, arguments):
    """Start an agent of torchrun with the worker."""
    paths = [str(HERE.parent / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", *options, str(HERE / "distributed_worker.py")]
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would stop the second of two agents
    process = subprocess.Popen([*launch, *map(str, arguments)], env=environment, stdout=said, stderr=said)
    return process, said


def finish(*agents):
    """Wait for agents, none of which may fail."""
    try:
        for process, said in agents:
            code = process.wait(timeout=900)
            said.seek(0)
            assert code == 0, said.read()[-6000:]
    finally:
        for process, _ in agents:
            process.terminate()  # and its workers


@pytest.mark.slow
def test_two_nodes_equal_one_process(start, tmp_path):
    """Two agents of torchrun with a process each: the defaults, gradient caching, a teacher, as in one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    finish(*(torchrun([*meeting, f"--node-rank={rank}"], [start, tmp_path, "nodes"]) for rank in (0, 1)))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0].pop("nodes") == ranks[1].pop("nodes") == [("0", "0"), ("1", "0")]
    initial = parameters(SentenceTransformer(str(start), device="cpu"))
    for name, got in ranks[0].items():
        alone = run_taught(start, tmp_path, 1) if name == "taught" else run_equal(name, start, tmp_path, 1)
        expected = parameters(alone)
        assert got.keys() == expected.keys()
        for key, value in got.items():
            assert torch.equal(value, ranks[1][name][key]), (name, key)
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
        assert max((expected[f"model.{key}"] - value).abs().max() for key, value in initial.items()) > 1e-3


@pytest.mark.parametrize("name", list(EQUAL))
def test_two_processes_equal_one(start, ranks, tmp_path, name):
    """After several steps model and projections are, to 1e-5, those of one process with the whole batch."""
    make, options, _ = EQUAL[name]
    initial = parameters(make(SentenceTransformer(str(start), device="cpu"), **options))
    expected = parameters(run_equal(name, start, tmp_path, 1))
    got = ranks[0][name]
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
    tail = ("model.2.",) if "tail" in name else ()
    for part in ("model.0.", *tail, "mipic_projections.sia.", "mipic_projections.pic."):
        keys = [key for key in got if key.startswith(part)]
        moved = sum((expected[key] - initial[key]).square().sum() for key in keys).sqrt()
        apart = sum((got[key] - expected[key]).square().sum() for key in keys).sqrt()
        assert moved > 1e-3, f"{part} has hardly moved"
        assert apart < 1e-3 * moved, f"{part} moved elsewhere"


def test_a_teacher_in_two_processes(start, ranks, tmp_path):
    """Each process follows the teacher within its own batch, and the gradient is the mean over them."""
    expected = parameters(run_taught(start, tmp_path, 1))
    got = ranks[0]["taught"]
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5, msg=key)
    initial = parameters(SentenceTransformer(str(start), device="cpu"))
    assert max((expected[f"model.{key}"] - value).abs().max() for key, value in initial.items()) > 1e-3


@pytest.mark.parametrize("name", [*EQUAL, "drift", "taught", "data sets", "whole", "resumed"])
def test_ranks_agree(ranks, name):
    """Model and projections are the same on both ranks to the last bit."""
    if name not in ranks[0]:
        pytest.skip("this transformers cannot resume on CPU in several processes")
    assert any("mipic_projections" in key for key in ranks[0][name])
    different = [key for key, value in ranks[0][name].items() if not torch.equal(value, ranks[1][name][key])]
    assert different == []


def test_the_ranks_had_something_to_agree_on(start, ranks, tmp_path):
    """Alone, each rank's seed and data lead elsewhere: agreement is no accident."""
    alone = dict(run_drift(start, tmp_path, 0).named_parameters())
    projections = [key for key in ranks[0]["drift"] if "mipic_projections" in key]
    assert not any(torch.equal(ranks[0]["drift"][key], alone[key]) for key in projections if "sia" in key)


def test_resuming_in_two_processes(ranks):
    """Stopped and resumed, both ranks end where the uninterrupted run ends, bit for bit."""
    if "resumed" not in ranks[0]:
        pytest.skip("this transformers cannot resume on CPU in several processes")
    for rank in ranks:
        assert all(torch.equal(value, rank["resumed"][key]) for key, value in rank["whole"].items())


@pytest.mark.parametrize("name", ["same", "shards"])
def test_rotate_model_in_two_processes(ranks, name):
    """Both end with the first one's rotation, to the last bit, whatever texts the second one has."""
    first, second = (rank["rotations"][name] for rank in ranks)
    assert "error" not in first
    assert torch.equal(first["matrix"], second["matrix"])
    assert first["parameters"].keys() == second["parameters"].keys()
    assert all(torch.equal(value, second["parameters"][key]) for key, value in first["parameters"].items())
    assert not first["unchanged"]
    assert ("different texts from the first" in second["log"]) == (name == "shards")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad on the second", "ValueError: .*12"),
        ("fit fails on the first", "ValueError: .*zero vectors"),
        ("card fails on the second", "ZeroDivisionError"),
    ],
)
def test_what_fails_in_one_process_fails_in_both(ranks, name, message):
    """With the same error, and no model is rotated."""
    first, second = (rank["rotations"][name] for rank in ranks)
    assert re.match(message, first["error"])
    assert first["error"] == second["error"]
    assert first["unchanged"]
    assert second["unchanged"]


@pytest.mark.parametrize("name", list(WITHOUT_PROJECTIONS))
def test_without_projections_a_sharded_model_trains(start, ranks, name):
    """Under fully_shard, two processes with a batch each end where one process with both batches ends."""
    if not SHARDS:
        pytest.skip("needs torch 2.7")
    initial = parameters(SentenceTransformer(str(start), device="cpu"))
    expected = parameters(run_by_hand(name, start, [0, 1], shard=False))
    for rank in ranks:
        got = rank[f"sharded, {name}"]
        assert got.keys() == expected.keys()
        for key, value in got.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5, msg=key)
    moved = max((expected[f"model.{key}"] - value).abs().max() for key, value in initial.items())
    assert moved > 1e-3


def test_training_by_several_processes_without_the_callback_is_refused(ranks):
    """Whoever averages the gradients in a loop of their own says so; without gradients nothing is asked."""
    for rank in ranks:
        assert "nobody averages their gradients" in rank["refusal"]
        assert "callbacks=[MIPICCallback(loss)]" in rank["refusal"]
        assert "lift_init='frozen' and pic_weight=0" in rank["refusal"]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MULTI_CPU"])
def test_projections_beside_what_shards_are_refused(tiny_model, tmp_path, monkeypatch, kind):
    """The callback asks the trainer's accelerator; without projections there is nothing to refuse."""
    from accelerate.state import DistributedType, PartialState

    model = tiny_model()
    loss, bare = make_loss(model), make_loss(model, **WITHOUT_PROJECTIONS["CKA alone"])
    trainer = make_trainer(model, loss, tmp_path, callbacks=[MIPICCallback(loss)])
    # accelerate shards on GPUs only, so its answer is given by hand
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType[kind])
    event = trainer.args, trainer.state, trainer.control
    MIPICCallback(bare).on_init_end(*event)
    if kind == "MULTI_CPU":
        MIPICCallback(loss).on_init_end(*event)
    else:
        with pytest.raises(ValueError, match="takes over the optimizer with the parameters of the model"):
            MIPICCallback(loss).on_init_end(*event)


def test_the_trainer_refuses_them_at_its_construction(tiny_model, tmp_path, monkeypatch):
    """The message, before anything was sharded, and not a KeyError of the optimizer later."""
    monkeypatch.setitem(callback._SHARDING, "NO", "FSDP")
    model = tiny_model()
    with pytest.raises(ValueError, match="FSDP takes over the optimizer"):
        make_trainer(model, loss := make_loss(model), tmp_path, callbacks=[MIPICCallback(loss)])


def test_gathered_targets_are_the_concatenated_batch():
    """PIC with targets of all devices: the mean over devices is the loss of the concatenated batch."""
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(2, 6, 8, generator=generator) for _ in range(2))
    expected = pic.chain_info_nce(predicted, target)
    parts = [pic.chain_info_nce(predicted[:, rank * 3 : rank * 3 + 3], target, offset=rank * 3) for rank in (0, 1)]
    torch.testing.assert_close(sum(parts) / 2, expected)
    assert not torch.isclose(pic.chain_info_nce(predicted[:, :3], target[:, :3]), parts[0])


def test_gathering_in_one_process_changes_nothing(tiny_model):
    """The option may stay on."""
    model = tiny_model()
    base = MultipleNegativesRankingLoss(model)
    features = column_features(model)
    values = [
        total(MIPICLoss(model, base, [32, 8], sia_layers=[DEPTH], gather_across_devices=gather)(features, None))
        for gather in (False, True)
    ]
    assert torch.equal(*values)
