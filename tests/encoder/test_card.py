"""The model card: a card that cannot be read stays as it is, and nothing fails for it."""

import pytest

from mipic_st import set_matryoshka_config


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
