"""A tiny model and a counter of texts, for the evaluation tests."""

from pathlib import Path

from conftest import assemble, save_encoder


def tiny_model(folder, kind="bert", *, normalize=True, layers=4, **options):
    """A fresh tiny model with four layers and Normalize, saved in the folder."""
    encoder = save_encoder(Path(folder) / f"backbone-{kind}-{layers}", kind, layers=layers)
    return assemble(encoder, normalize=normalize, **options)


class CountingModel:
    """Wraps a model's encode on the instance and records which texts reach it."""

    def __init__(self, model, monkeypatch):
        self.texts = []
        original = model.encode

        def encode(inputs, *args, **kwargs):
            self.texts.extend([inputs] if isinstance(inputs, str) else list(inputs))
            return original(inputs, *args, **kwargs)

        monkeypatch.setattr(model, "encode", encode)
