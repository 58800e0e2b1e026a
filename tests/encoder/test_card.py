"""What the config and the card say about dims, what they no longer say, and cards that cannot be read."""

from __future__ import annotations

import json

import huggingface_hub
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from conftest import WIDTH, make_tokenizer
from mipic_st import set_matryoshka_config


def test_set_matryoshka_config_by_hand(tiny_model, tmp_path):
    """The public function does the same without training; it can be repeated and checks its dims."""
    model = tiny_model()
    set_matryoshka_config(model, [32, 8])
    set_matryoshka_config(model, np.array([16, 32]), [(16, 2), (32, 3)])
    model.save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["matryoshka_dimensions"], config["mipic_chain"]) == ([16, 32], [[16, 2], [32, 3]])
    for dims in ([], [0, 8], [WIDTH + 1], [8, 8], "16", [8.5], [True]):
        with pytest.raises((TypeError, ValueError), match=r"^matryoshka_dims "):
            set_matryoshka_config(model, dims)
    for chain, message in (
        ([(16, 4)], "pic_chain: layer 4 of .* from 1 to the model's depth of 3"),
        ([(0, 1)], "pic_chain: dim 0 of .* from 1 to the model's width of 32"),
        ([(64, 1)], "pic_chain: dim 64 of"),
        ([(16, 2.0)], "pic_chain: layer 2.0 of"),
        ([16, 2], r"pic_chain must be \(dim, layer\) pairs"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            set_matryoshka_config(model, [8], chain)
    assert model[0].auto_model.config.mipic_chain == [[16, 2], [32, 3]]
    set_matryoshka_config(model, [16])
    model.save(str(tmp_path))
    assert "mipic_chain" not in json.loads((tmp_path / "config.json").read_text()), "a training without PIC has none"
    static = SentenceTransformer(modules=[StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=16)])
    with pytest.raises(ValueError, match="no Transformer module"):
        set_matryoshka_config(static, [8, 16])


def test_a_model_without_smaller_dims_has_no_such_line(tiny_model, tmp_path):
    """The full width alone is no Matryoshka model to a reader."""
    model = tiny_model()
    set_matryoshka_config(model, [WIDTH])
    model.save(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "truncate_dim" not in card
    assert "- matryoshka\n" not in card


@pytest.mark.parametrize("loaded", [True, False])
def test_what_was_said_of_smaller_dims_goes(tiny_model, tmp_path, loaded):
    """A model that is now trained at full width alone no longer says that it can be cut; loaded cards, and new ones."""
    model = tiny_model()
    if loaded:
        model.save(str(tmp_path / "start"))
        model = SentenceTransformer(str(tmp_path / "start"), device="cpu")
    for number, dims in enumerate(([4, WIDTH], [WIDTH])):
        set_matryoshka_config(model, dims)
        model.save(str(tmp_path / str(number)))
        card = (tmp_path / str(number) / "README.md").read_text()
        assert ("can be cut to 4 values" in card) == (number == 0)
        assert ("## Truncated embeddings" in card) == (loaded and number == 0)


def test_the_authors_own_section_stays(tiny_model):
    """A section of that name with other words is not ours; the tag goes with what was said."""
    model = tiny_model()
    own = "## Truncated embeddings\n\nWe measured them by hand.\n"
    model._model_card_text = f"---\ntags:\n- mine\n---\n# A model\n\n{own}\n## More\n\nWords.\n"
    set_matryoshka_config(model, [8, WIDTH])
    assert own in model._model_card_text
    assert "can be cut to 8 values" in model._model_card_text
    assert model._model_card_text.count("- matryoshka") == 1
    set_matryoshka_config(model, [WIDTH])
    assert own in model._model_card_text
    assert "## More" in model._model_card_text
    assert "can be cut" not in model._model_card_text
    assert "matryoshka" not in model._model_card_text.split("---")[1]
    assert "matryoshka" not in (model.model_card_data.tags or [])


@pytest.mark.parametrize(
    ("front", "tags"),
    [
        ("- a list", None),
        ("words", None),
        ("a: [", None),
        ("tags: 5", None),
        ("tags: one", "- one\n- matryoshka\n"),
        ("tags: [one, two]", "- one\n- two\n- matryoshka\n"),
        ("language: en", "- matryoshka\n"),
    ],
)
def test_any_front_matter_is_survived(tiny_model, caplog, front, tags):
    """It comes from other people's models. The config says the dims in any case."""
    if front == "tags: one" and huggingface_hub.__version__.startswith("1."):
        pytest.skip("this huggingface_hub reads a single tag letter by letter")
    model = tiny_model()
    model._model_card_text = card = f"---\n{front}\n---\n# A model\n"
    set_matryoshka_config(model, [8, 4])
    assert model[0].auto_model.config.matryoshka_dimensions == [4, 8]
    if tags is None:
        assert model._model_card_text == card
        assert "its front matter cannot be read" in caplog.text
    else:
        assert tags in model._model_card_text
        assert "Its vectors can be cut to 4 or 8 values" in model._model_card_text
