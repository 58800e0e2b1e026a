"""A tiny model and data, as files that a command reads."""

from conftest import sentences
from evaluation_fixtures import tiny_model


def write_files(tmp_path):
    """A model in a folder, texts and pairs in files."""
    texts = list(dict.fromkeys(sentences(300, seed=3, shortest=3)))
    tiny_model(tmp_path).save_pretrained(str(tmp_path / "model"))
    (tmp_path / "texts.txt").write_text("\n".join([*texts, "", texts[0]]) + "\n")
    rows = zip(texts[:140], texts[140:280], strict=True)
    (tmp_path / "pairs.csv").write_text("anchor,positive\n" + "".join(f"{a},{b}\n" for a, b in rows))
    return tmp_path
