"""A tiny model and a counter of texts, for the evaluation tests."""

from pathlib import Path

from sentence_transformers import SentenceTransformer

from conftest import assemble, save_encoder


def tiny_model(folder, kind="bert", *, normalize=True, layers=4, **options):
    """A fresh tiny model with four layers and Normalize, saved in the folder."""
    encoder = save_encoder(Path(folder) / f"backbone-{kind}-{layers}", kind, layers=layers)
    return assemble(encoder, normalize=normalize, **options)


class CountingModel:
    """Records which texts reach the model's encode; the model itself stays as it is."""

    def __init__(self, model, monkeypatch):
        self.texts = []
        original = SentenceTransformer.encode

        def encode(called, inputs, *args, **kwargs):
            if called is model:
                self.texts.extend([inputs] if isinstance(inputs, str) else list(inputs))
            return original(called, inputs, *args, **kwargs)

        monkeypatch.setattr(SentenceTransformer, "encode", encode)
