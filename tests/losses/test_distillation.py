"""The teacher's term: against a slow reference, with every kind of base loss, and the data that carries it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding
from torch.nn import functional as F

from conftest import ARCHITECTURES, DIMS, WIDTH, all_terms, column_features, gradients, make_tokenizer, sentences, total
from mipic_st import MIPICCallback, MIPICLoss, add_teacher_vectors
from mipic_st.losses.distillation import similarity_divergence
from training_fixtures import datasets, make_trainer


def reference(columns, teacher, dim, temperature):
    """Sum over all pairs, in plain Python; columns and teacher are lists of arrays, anchors first."""

    def cosines(parts):
        others = [row for column in parts[1:] for row in column]
        return [[float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in others] for a in parts[0]]

    value = 0.0
    for seen, wanted in zip(cosines([c[:, :dim] for c in columns]), cosines(teacher), strict=True):
        p = np.exp(np.array(wanted) / temperature) / np.exp(np.array(wanted) / temperature).sum()
        q = np.exp(np.array(seen) / temperature) / np.exp(np.array(seen) / temperature).sum()
        value += float((p * np.log(p / q)).sum())
    return value / len(columns[0])


def teacher_vectors(rows=6, columns=2, width=10, seed=5):
    """Labels as add_teacher_vectors makes them, (B, C, T)."""
    return torch.randn(rows, columns, width, generator=torch.Generator().manual_seed(seed))


def alone(model, base, **settings):
    """MIPICLoss with nothing but the base loss and the teacher."""
    return MIPICLoss(model, base, DIMS, **{"attention_weight": 0, "cka_weight": 0, "distill_weight": 3.0, **settings})


def assert_same(found, wanted):
    """Gradients up to 1e-4 of each parameter's largest; the floor is for key biases, which have none but rounding."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_divergence_against_the_reference(columns, temperature):
    """Every dim alone, with several columns of candidates and a teacher of another width."""
    vectors = torch.randn(columns, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    teacher = torch.randn(columns, 5, 11, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    found = similarity_divergence(vectors, teacher, [8, 3], temperature)
    wanted = [reference(list(vectors.numpy()), list(teacher.numpy()), dim, temperature) for dim in (8, 3)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9)
    vectors.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: similarity_divergence(v, teacher, [8, 3], temperature), [vectors])


def test_an_anchor_is_not_compared_with_its_own_text():
    """The value is that of the other candidates alone, whichever columns and rows hold the anchor's text again."""
    teacher = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    vectors = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    again = [(0, 1, 0), (0, 2, 3), (4, 1, 2)]  # the anchor of a row stands in a column and row, too
    for anchor, column, row in again:
        teacher[column, row] = teacher[0, anchor]
    found = similarity_divergence(vectors, teacher, [8], 0.1)
    wanted = 0.0
    for anchor in range(5):
        rows = [(c, r) for c in (1, 2) for r in range(5) if (anchor, c, r) not in again]
        parts = [[part[:1, anchor].numpy(), np.stack([part[c, r] for c, r in rows])] for part in (vectors, teacher)]
        wanted += reference(*parts, 8, 0.1)
    assert float(found) == pytest.approx(wanted / 5, rel=1e-9)
    alone = similarity_divergence(vectors[:2, :1], teacher[:2, :1], [8], 0.1)
    assert float(alone) == 0, "no candidate but itself"


def test_several_positives_of_one_query_are_no_negatives():
    """A student that sees what the teacher sees is at rest, however often queries and answers come in a batch."""
    queries, answers = (torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    rows = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 1], [1, 1], [2, 3]])
    vectors = torch.stack([queries[rows[:, 0]], answers[rows[:, 1]]])
    student = vectors.clone().requires_grad_()
    (value,) = similarity_divergence(student, vectors, [8], 0.1)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_the_teacher_is_a_constant_and_half_precision_is_left():
    """No gradient into the teacher; bfloat16 vectors give what their float32 values give."""
    vectors, teacher = (torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    teacher.requires_grad_()
    assert not similarity_divergence(vectors, teacher, [4], 0.1).requires_grad
    half = vectors.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = similarity_divergence(half, teacher, [4], 0.1)
    assert found.dtype == torch.float32
    assert torch.equal(found, similarity_divergence(half.float(), teacher, [4], 0.1))


BASES = {
    "mnrl-2": (losses.MultipleNegativesRankingLoss, 2),
    "mnrl-4": (losses.MultipleNegativesRankingLoss, 4),
    "triplet": (losses.TripletLoss, 3),
    "symmetric": (losses.MultipleNegativesSymmetricRankingLoss, 2),
}


@pytest.mark.parametrize("case", BASES)
def test_term_of_the_loss(tiny_model, case):
    """(1 - alpha) * weight * the sum over all dims, the full width among them, whatever dims are drawn."""
    make, columns = BASES[case]
    # dims are drawn in training mode only, where dropout would make each pass another
    model = tiny_model(training=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    features, teacher = column_features(model, columns), teacher_vectors(columns=columns)
    terms = alone(model, make(model), alpha=0.7, distill_temperature=0.2, n_dims_per_step=1)(features, teacher)
    vectors = [model(dict(column))["sentence_embedding"].detach().double().numpy() for column in features]
    constant = list(teacher.transpose(0, 1).double().numpy())
    wanted = sum(reference(vectors, constant, dim, 0.2) for dim in DIMS)
    assert set(terms) == {"matryoshka", "distillation"}
    assert terms["distillation"].item() == pytest.approx(0.3 * 3 * wanted, rel=1e-4)
    averaged = alone(model, make(model), alpha=0.7, distill_temperature=0.2, aggregation="mean")(features, teacher)
    assert averaged["distillation"].item() == pytest.approx(terms["distillation"].item() / len(DIMS), rel=1e-5)
    plain = MIPICLoss(model, make(model), DIMS, alpha=1)(features, None)
    assert averaged["matryoshka"].item() == pytest.approx(0.7 * plain["matryoshka"].item(), rel=1e-6)


class TaughtRanking(losses.MultipleNegativesRankingLoss):
    """The same as a base loss, to be put under MatryoshkaLoss; labels are the teacher's vectors."""

    def forward(self, sentence_features, labels):
        first, second = (self.model(features)["sentence_embedding"] for features in sentence_features)
        teacher = F.normalize(labels, dim=-1)
        wanted = (teacher[:, 0] @ teacher[:, 1].T / 0.1).softmax(dim=1)
        seen = (F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / 0.1).log_softmax(dim=1)
        divergence = (wanted * (wanted.log() - seen)).sum() / len(first)
        return self.compute_loss_from_embeddings([first, second], None) + divergence


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_a_taught_base_loss(tiny_model, architecture):
    """With a weight of 4 and alpha of 0.8, base loss and teacher count equally: 0.8 times the taught MatryoshkaLoss."""
    model = tiny_model(architecture)
    features, teacher = column_features(model), teacher_vectors()
    total(alone(model, losses.MultipleNegativesRankingLoss(model), distill_weight=4.0)(features, teacher)).backward()
    found = gradients(model)
    model.zero_grad()
    (0.8 * losses.MatryoshkaLoss(model, TaughtRanking(model), DIMS)(features, teacher)).backward()
    assert_same(found, gradients(model))


@pytest.mark.parametrize("settings", [{"attention_weight": 0.0, "cka_weight": 0.0, "pic_weight": 0.0}, {}])
def test_cached_loss_is_the_same(tiny_model, settings):
    """Values and gradients, in mini-batches, with and without SIA and PIC."""
    model = tiny_model()
    features, teacher = column_features(model, 3), teacher_vectors(columns=3)
    results = []
    for base in (
        losses.MultipleNegativesRankingLoss(model),
        losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
    ):
        loss = all_terms(model, base, DIMS, distill_weight=2.0, **settings)
        model.zero_grad()
        terms = loss(features, teacher)
        total(terms).backward()
        results.append(({name: term.item() for name, term in terms.items()}, gradients(loss)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert "distillation" in results[0][0]
    assert_same(results[1][1], results[0][1])


def test_static_embeddings_can_have_a_teacher():
    """The term needs sentence vectors only, so also a model without layers has it."""
    torch.manual_seed(0)
    module = StaticEmbedding(make_tokenizer()._tokenizer, embedding_dim=WIDTH)
    model = SentenceTransformer(modules=[module], device="cpu")
    terms = alone(model, losses.MultipleNegativesRankingLoss(model))(column_features(model), teacher_vectors())
    assert terms["distillation"] > 0
    total(terms).backward()
    assert module.embedding.weight.grad.abs().sum() > 0


def test_without_it_labels_belong_to_the_base_loss(tiny_model):
    """A weight of zero, or alpha of one: scores reach the base loss, and the value is MatryoshkaLoss's."""
    model = tiny_model()
    features, scores = column_features(model), torch.linspace(0, 1, 6)
    wanted = losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), DIMS)(features, scores)
    for settings in ({"distill_weight": 0.0, "alpha": 0.8}, {"distill_weight": 5.0, "alpha": 1}):
        terms = alone(model, losses.CoSENTLoss(model), **settings)(features, scores)
        assert list(terms) == ["matryoshka"]
        assert torch.equal(terms["matryoshka"], wanted)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (None, "None"),
        (torch.zeros(6), r"shape \(6,\)"),
        (torch.zeros(6, 3, 4), r"shape \(6, 3, 4\)"),
    ],
)
def test_labels_that_are_no_teacher(tiny_model, labels, found):
    """The message says what is needed and what came."""
    model = tiny_model()
    loss = alone(model, losses.MultipleNegativesRankingLoss(model))
    with pytest.raises(ValueError, match=rf"\(B, 2, T\), got .*{found}.*add_teacher_vectors"):
        loss(column_features(model), labels)


def test_base_losses_that_cannot_have_a_teacher(tiny_model):
    """One that needs labels of its own says so, as does a single column, and one that embeds other sentences."""
    model = tiny_model()
    with pytest.raises((AttributeError, TypeError)) as caught:
        alone(model, losses.CoSENTLoss(model))(column_features(model), teacher_vectors())
    assert "CoSENTLoss gets none" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="labels") as caught:
        alone(model, losses.MSELoss(model))(column_features(model), teacher_vectors())
    assert "MSELoss gets none" in caught.value.__notes__[0]
    # without any further term too, where it would train at full width only
    for settings in ({}, {"distill_weight": 0}, {"alpha": 1}):
        loss = alone(model, losses.MultipleNegativesRankingLoss(tiny_model()), **settings)
        with pytest.raises(RuntimeError, match="did not call the model that MIPICLoss holds"):
            loss(column_features(model), teacher_vectors())
    with pytest.raises(ValueError, match="two columns of texts or more"):
        alone(model, losses.BatchAllTripletLoss(model))(column_features(model, 1), teacher_vectors(columns=1))

    class Half(losses.MultipleNegativesRankingLoss):
        def forward(self, sentence_features, labels):
            return super().forward(sentence_features[:2], labels)

    with pytest.raises(RuntimeError, match="12 sentences, and labels are the larger model's vectors of 3 columns of 6"):
        alone(model, Half(model))(column_features(model, 3), teacher_vectors(columns=3))


def test_settings_are_kept(tiny_model):
    """In the config for the model card, from a preset, and for another model of the same shape."""
    model = tiny_model()
    base = losses.MultipleNegativesRankingLoss(model)
    loss = MIPICLoss.from_preset(model, base, "released", DIMS, distill_weight=2.5, distill_temperature=0.3)
    config = loss.get_config_dict()
    assert (config["distill_weight"], config["distill_temperature"]) == (2.5, 0.3)
    loss.model = tiny_model()
    assert (loss.settings.distill_weight, loss.settings.distill_temperature) == (2.5, 0.3)


# --- the data ---------------------------------------------------------------------------------------------------------


def triplets():
    """Twelve rows of three columns; some texts come twice, also in different columns."""
    anchors, positives, negatives = (sentences(12, seed=seed) for seed in range(3))
    positives[3], negatives[5] = positives[0], anchors[1]
    return datasets.Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": negatives})


def test_vectors_are_the_teachers(tiny_model):
    """Each distinct text is encoded once, in one call, and stands at its place."""
    teacher, data = tiny_model("mpnet"), triplets()
    calls, encode = [], teacher.encode
    teacher.encode = lambda texts, **options: calls.append(list(texts)) or encode(texts, **options)
    taught = add_teacher_vectors(data, teacher, batch_size=5)
    assert taught.column_names == ["anchor", "positive", "negative", "label"]
    assert data.column_names == ["anchor", "positive", "negative"]
    (texts,) = calls
    assert len(texts) == len(set(texts)) == 34
    labels = np.array(taught["label"][:])
    assert labels.shape == (12, 3, WIDTH)
    for place, name in enumerate(data.column_names):
        np.testing.assert_allclose(labels[:, place], encode(data[name][:]), atol=1e-5)


def test_prompts_of_the_teacher(tiny_model):
    """One for all, or one per column: then the same text has two vectors."""
    teacher = tiny_model()
    data = datasets.Dataset.from_dict({"query": ["a dog eats", "the cat sees"], "document": ["a dog eats", "a book"]})
    labels = np.array(add_teacher_vectors(data, teacher, prompts={"query": "the old "})["label"][:])
    np.testing.assert_allclose(labels[:, 0], teacher.encode(data["query"][:], prompt="the old "), atol=1e-5)
    np.testing.assert_allclose(labels[:, 1], teacher.encode(data["document"][:]), atol=1e-5)
    assert not np.allclose(labels[0, 0], labels[0, 1])
    labels = np.array(add_teacher_vectors(data, teacher, prompts="the old ")["label"][:])
    np.testing.assert_allclose(labels[:, 1], teacher.encode(data["document"][:], prompt="the old "), atol=1e-5)


def test_a_truncated_teacher_teaches_at_full_width(tiny_model):
    """truncate_dim is how a model is served, not what it knows."""
    teacher = tiny_model()
    teacher.truncate_dim = 4
    assert np.array(add_teacher_vectors(triplets(), teacher)["label"][:]).shape == (12, 3, WIDTH)


PAIR = {"anchor": ["a dog"], "positive": ["the dog"]}
WRONG_DATA = [
    ({**PAIR, "score": [1.0]}, ValueError, "has the column 'score'"),
    ({**PAIR, "label": [1]}, ValueError, "has the column 'label'"),
    ({"anchor": ["a dog"]}, ValueError, "two columns of texts or more, got 1"),
    ({"anchor": [], "positive": []}, ValueError, "two columns of texts or more, got 0"),
    ({**PAIR, "number": [3]}, TypeError, "column 'number' of dataset"),
    ({**PAIR, "negative": [None]}, TypeError, "column 'negative' of dataset"),
]


@pytest.mark.parametrize(("columns", "kind", "message"), WRONG_DATA)
def test_data_that_cannot_be_taught(tiny_model, columns, kind, message):
    with pytest.raises(kind, match=message):
        add_teacher_vectors(datasets.Dataset.from_dict(columns), tiny_model())


def test_other_wrong_arguments(tiny_model):
    data, teacher = datasets.Dataset.from_dict(PAIR), tiny_model()
    with pytest.raises(TypeError, match="give one of its splits"):
        add_teacher_vectors(datasets.DatasetDict(train=data), teacher)
    with pytest.raises(TypeError, match=r"must be a datasets\.Dataset, got list"):
        add_teacher_vectors([("a", "b")], teacher)
    with pytest.raises(TypeError, match="teacher must be a SentenceTransformer, got str"):
        add_teacher_vectors(data, "all-mpnet-base-v2")
    with pytest.raises(TypeError, match="got IterableDataset"):
        add_teacher_vectors(data.to_iterable_dataset(), teacher)
    for hidden in (data.with_transform(lambda row: row), data.with_format(None, columns=["anchor"])):
        with pytest.raises(ValueError, match="a transform, or a format that hides columns"):
            add_teacher_vectors(hidden, teacher)
    with pytest.raises(ValueError, match=r"prompts names \['5', 'query'\]"):
        add_teacher_vectors(data, teacher, prompts={"query": "q: ", 5: "x"})
    for prompts in (["a: "], 5, {"anchor": 5}):
        with pytest.raises(TypeError, match="prompts must"):
            add_teacher_vectors(data, teacher, prompts=prompts)
    with pytest.raises(ValueError, match="batch_size"):
        add_teacher_vectors(data, teacher, batch_size=0)


def test_without_datasets_the_extra_is_named(tiny_model, monkeypatch):
    """datasets is needed here only, and is not part of the plain installation."""
    dataset, teacher = datasets.Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}), tiny_model()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"add_teacher_vectors needs datasets.*mipic-st\[train\]"):
        add_teacher_vectors(dataset, teacher)


def test_a_teacher_without_a_direction(tiny_model):
    """A vector of zeros or of NaN would teach nothing, or everything; the message names the text and its place."""
    teacher, data = tiny_model(training=True), triplets()
    encode, broken = teacher.encode, data["positive"][7]
    for value in (0.0, np.nan):
        # stands for a broken model
        teacher.encode = lambda texts, value=value, **options: np.stack(
            [row * (value if text == broken else 1) for text, row in zip(texts, encode(texts, **options), strict=True)]
        )
        with pytest.raises(ValueError, match=rf"vector of '{broken}' \(column 'positive', row 7\) is zero or not"):
            add_teacher_vectors(data, teacher)
        assert teacher.training


def test_routes_of_the_teacher(tiny_model):
    """A Router is asked for each column's route; without a mapping it takes its default."""
    queries, documents = tiny_model(), tiny_model("mpnet")
    router = Router.for_query_document([*queries], [*documents], default_route="query")
    teacher = SentenceTransformer(modules=[router], device="cpu")
    data = datasets.Dataset.from_dict({"query": ["a dog eats", "the cat sees"], "document": ["a dog eats", "a book"]})
    labels = add_teacher_vectors(data, teacher, router_mapping={"document": "document"})["label"][:]
    np.testing.assert_allclose(labels[:, 0], queries.encode(data["query"][:]), atol=1e-5)
    np.testing.assert_allclose(labels[:, 1], documents.encode(data["document"][:]), atol=1e-5)
    labels = add_teacher_vectors(data, teacher)["label"][:]
    np.testing.assert_allclose(labels[:, 1], queries.encode(data["document"][:]), atol=1e-5)
    with pytest.raises(ValueError, match=r"router_mapping names \['text'\]"):
        add_teacher_vectors(data, teacher, router_mapping={"text": "query"})


def test_later_steps_keep_rows_and_vectors_together(tiny_model, tmp_path):
    """Shuffled, selected, joined, written and read: each row has the vectors of its texts, and two have two names."""
    teacher, data = tiny_model(), triplets()
    first = add_teacher_vectors(data.select(range(5)), teacher)
    second = add_teacher_vectors(data.shuffle(seed=1), teacher)
    assert first._fingerprint != add_teacher_vectors(data.select(range(5)), teacher)._fingerprint
    datasets.concatenate_datasets([first, second]).shuffle(seed=2).save_to_disk(str(tmp_path / "taught"))
    taught = datasets.load_from_disk(str(tmp_path / "taught"))
    assert len(taught) == 17
    assert taught["label"][:].dtype == torch.float32
    for place, name in enumerate(data.column_names):
        np.testing.assert_allclose(taught["label"][:][:, place], teacher.encode(taught[name][:]), atol=1e-5)


def test_several_positives_keep_their_rows_and_vectors(tiny_model):
    """No row goes, each has the vectors of its own texts, and each distinct text is encoded once."""
    teacher, texts = tiny_model(), sentences(9, seed=3)
    pairs = [(0, 3), (0, 4), (1, 4), (0, 3), (2, 0), (1, 5)]
    data = datasets.Dataset.from_dict(
        {"query": [texts[first] for first, _ in pairs], "answer": [texts[second] for _, second in pairs]}
    )
    taught = add_teacher_vectors(data, teacher, batch_size=2).shuffle(seed=1)
    assert len(taught) == 6
    for place, name in enumerate(data.column_names):
        np.testing.assert_allclose(taught["label"][:][:, place], teacher.encode(taught[name][:]), atol=1e-5)


@pytest.mark.parametrize("join", [datasets.concatenate_datasets, datasets.interleave_datasets])
@pytest.mark.parametrize("written", [False, True])
def test_columns_in_another_order_cannot_be_joined(tiny_model, tmp_path, join, written):
    """The vectors go by the order of the columns, joining goes by their names: half of the rows would be wrong."""
    teacher, data = tiny_model(), triplets()
    first = add_teacher_vectors(data, teacher)
    second = add_teacher_vectors(data.select_columns(["positive", "anchor", "negative"]), teacher)
    if written:
        second.shuffle(seed=0).save_to_disk(str(tmp_path / "second"))
        second = datasets.load_from_disk(str(tmp_path / "second"))
    with pytest.raises(ValueError, match="features can't be aligned because the key label"):
        join([first, second])
    # put into another order behind the teacher, they are joined rightly: the vectors are the first order's
    joined = join([first, first.select_columns(["negative", "positive", "anchor", "label"])])
    for place, name in enumerate(data.column_names):
        vectors = np.array(joined["label"][:])[:, place]
        np.testing.assert_allclose(vectors, teacher.encode(joined[name][:]), atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_the_callback_refuses_columns_in_another_order(tiny_model, tmp_path, several):
    """Chosen in another order or renamed after the teacher, also in one of several data sets."""
    model = tiny_model()
    taught = add_teacher_vectors(triplets(), model)
    loss = alone(model, losses.MultipleNegativesRankingLoss(model))

    def train(data):
        if several:
            data = datasets.DatasetDict({"one": taught, "two": data})
        make_trainer(model, loss, tmp_path, data, max_steps=1, callbacks=[MIPICCallback(loss)]).train()

    train(taught.shuffle(seed=0))
    for changed in (
        taught.select_columns(["positive", "anchor", "negative", "label"]),
        taught.rename_columns({"anchor": "positive", "positive": "anchor"}),
    ):
        with pytest.raises(ValueError, match=r"vectors are those of \['anchor', 'positive', 'negative'\]"):
            train(changed)


def test_in_the_trainer(tiny_model, tmp_path):
    """Vectors reach the loss through collator and shuffling, the term falls and is logged, the card is written."""
    model, teacher = tiny_model(training=True), tiny_model("mpnet", training=True)
    anchors, positives = sentences(64, seed=8), sentences(64, seed=9)
    data = add_teacher_vectors(datasets.Dataset.from_dict({"a": anchors, "b": positives}), teacher)
    assert teacher.training
    loss = alone(model, losses.MultipleNegativesRankingLoss(model), distill_weight=20.0)
    trainer = make_trainer(
        model,
        loss,
        tmp_path / "run",
        data,
        eval_dataset=data,
        max_steps=24,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        logging_steps=8,
    )
    start = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start["eval_loss"]
    logged = [entry["distillation"] for entry in trainer.state.log_history if "distillation" in entry]
    assert len(logged) == 3
    assert logged[-1] < logged[0]
    model.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "distill_weight" in card
    assert max(map(len, card.splitlines())) < 2000, "vectors of samples do not belong into the card"
    with pytest.raises(ValueError, match="evaluation dataset needs them too"):
        trainer.evaluate(data.remove_columns("label"))
