"""The tables of README and of the pages with results, made of the committed reports in ``results/``.

After new results, this puts them into the documents, digit for digit:

    python examples/benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / ".docs" / "pages" / f"{name}.md" for name in ("results", "results-retrieval", "appendix", "databases")),
    ROOT / "examples" / "benchmarks" / "results" / "SEARCHES.md",
]
# the comparison from the rotated start, more rows from it, the earlier one of plain starts, good and weak, and what
# needs no training
FILES = {
    "rotated": "compare_losses.json",
    "more": "rotated_start.json",
    "later": "rotated_start_later.json",
    "weak": "weak_start.json",
    "weak more": "weak_more.json",
    "weak rotated": "weak_rotated.json",
    "weak taught": "weak_teacher.json",
    "second": "second_model.json",
    "curve": "curve.json",
    "half": "half_depth.json",
    "plain": "plain_starts.json",
    "untrained": "rotations.json",
    "wide": "rotations_mpnet.json",
    "retrieval": "retrieval.json",
    "search static": "retrieval_static.json",
    "search mpnet": "retrieval_mpnet.json",
    "trained on pairs": "corpus_training.json",
    "engines": "engines.json",
}

ROWS = {
    "truncation": "truncation, no training",
    "pca": "PCA, no training",
    "rotation": "**rotation, no training**",
    "base": "base loss",
    "base+pca": "base loss, then PCA",
    "base+rotation": "base loss, then rotation",
    "matryoshka": "`MatryoshkaLoss`",
    "matryoshka-2d": "`Matryoshka2dLoss`",
    "specialist-16": "`MatryoshkaLoss`, 16 dims only",
    "specialist-8": "`MatryoshkaLoss`, 8 dims only",
    "rotation+matryoshka": "rotation, then `MatryoshkaLoss`",
    "mipic": "`MIPICLoss`",
    "rotation+mipic": "**rotation, then `MIPICLoss`**",
}
PLAIN_ROWS = {
    "untrained": "untrained, truncated",
    "base": "base loss only",
    "base-pca": "base loss only, then PCA",
    "matryoshka": "`MatryoshkaLoss`",
    "matryoshka-weighted": "`MatryoshkaLoss`, small dims weighted",
    "specialist-16": "`MatryoshkaLoss`, 16 dims only",
    "specialist-8": "`MatryoshkaLoss`, 8 dims only",
    "matryoshka-2d": "`Matryoshka2dLoss`",
    "mipic-paper": "`MIPICLoss`, paper preset",
    "mipic": "`MIPICLoss`, defaults at that time",
}
# rows in float32
MORE_ROWS = {
    "base+rotation": "base loss, then rotation",
    "rotation+mipic": "**rotation, then `MIPICLoss`**",
    "rotation+mipic-teacher": "**rotation, then `MIPICLoss` with a larger teacher**",
    "rotation+mipic+rotation": "rotation, `MIPICLoss`, another rotation",
    "rotation+mipic-released": "rotation, then `MIPICLoss`, released preset",
    "rotation+specialist-16": "rotation, then `MatryoshkaLoss`, 16 dims only",
    "rotation+specialist-8": "rotation, then `MatryoshkaLoss`, 8 dims only",
    "rotation+matryoshka-2d": "rotation, then `Matryoshka2dLoss`",
    "rotation+adaptive-layer": "rotation, then `AdaptiveLayerLoss`",
}
# the same later, on another fit of the rotation, and a third time from the weak encoder
LATER_ROWS = {
    "rotation": ROWS["rotation"],
    "rotation+mipic": ROWS["rotation+mipic"],
    "rotation+matryoshka-2d": MORE_ROWS["rotation+matryoshka-2d"],
    "rotation+mipic-paper": "rotation, then `MIPICLoss`, paper preset",
    "adaptive-layer": "`AdaptiveLayerLoss`",
}
WEAK_ROWS = {
    name: (ROWS | MORE_ROWS)[name]
    for name in (
        *("rotation", "rotation+matryoshka", "rotation+mipic", "rotation+mipic+rotation", "rotation+matryoshka-2d"),
        *("rotation+specialist-16", "rotation+specialist-8"),
    )
} | {"rotation+specialist-16+rotation": "rotation, `MatryoshkaLoss` for 16 dims only, another rotation"}
TAUGHT_ROWS = {
    name: (ROWS | MORE_ROWS | LATER_ROWS)[name]
    for name in ("rotation", *(f"rotation+mipic{kind}" for kind in ("", "-teacher", "-released", "-paper")))
} | {"rotation+mipic-teacher+rotation": "rotation, `MIPICLoss` with a larger teacher, another rotation"}
RIVALS = ["truncation", "base", "matryoshka", "matryoshka-2d", "specialist", "rotation", "rotation+matryoshka"]
RIVALS += ["rotation+mipic"]


def load(name):
    return json.loads((ROOT / "examples" / "benchmarks" / "results" / FILES[name]).read_text(encoding="utf-8"))


def table(head, rows):
    """A Markdown table whose first column is text."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def rate(about):
    """As code, which does not break at its hyphen."""
    if not about["learning_rate"]:
        return ""
    figure, exponent = f"{about['learning_rate']:.3e}".split("e")
    return f"`{float(figure):g}e{int(exponent)}`"


def cell(about, measure, dim, spread=True):
    value = about[measure][str(dim)]
    return f"{value['mean']:.1f}" + (f" ±{value['std']:.1f}" if spread and about["seeds"] > 1 else "")


def difference(by_dim, dim):
    found = (by_dim or {}).get(str(dim))
    return f"{found['difference']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]" if found else ""


def summary(entry):
    """What a reader chooses from, on one screen."""
    columns = [("sts", dim) for dim in (384, 64, 16, 8)] + [("accuracy@1", dim) for dim in (64, 16, 8)]
    head = ["", *(f"{'STS' if measure == 'sts' else 'intent'} {dim}" for measure, dim in columns)]
    names = ("truncation", "rotation", "matryoshka", "rotation+matryoshka", "rotation+mipic")
    return table(head, [[ROWS[name], *(cell(entry[name], *column) for column in columns)] for name in names])


def scores(measure, dims=(384, 256, 128, 64, 32, 16, 8), labels=ROWS):
    def made(entry):
        names = [name for name in labels if name in entry and measure in entry[name]]
        rows = [[labels[name], rate(entry[name]), *(cell(entry[name], measure, dim) for dim in dims)] for name in names]
        return table(["", "rate", *dims], rows)

    return made


def differences(name, measure, dims):
    names = TAUGHT_ROWS | WEAK_ROWS | MORE_ROWS | ROWS

    def made(entry):
        found = entry[name][f"{measure} differences"]
        rows = [
            [names.get(rival, "`MatryoshkaLoss` for that dim only"), *(difference(found[rival], dim) for dim in dims)]
            for rival in RIVALS
            if rival in found
        ]
        return table([f"{names[name].replace('**', '')} minus", *dims], rows)

    return made


def curve(entry):
    """STS by seconds of rotation and training."""
    dims = (384, 64, 16, 8)
    rows = []
    for name in ("matryoshka", "rotation+mipic"):
        for point in entry[name]["curve"][0]:
            cells = [f"{mean(by_dim[str(dim)] for by_dim in point['scores'].values()):.1f}" for dim in dims]
            rows.append([ROWS[name], point["step"], f"{point['seconds']:.0f}", *cells])
    return table(["", "steps", "seconds", *dims], rows)


def half_depth(stages):
    """Mean and, over several trainings, standard deviation."""
    dims = list(next(iter(stages.values()))[0])

    def shown(values):
        return f"{mean(values):.1f}" + (f" ±{stdev(values):.1f}" if len(values) > 1 else "")

    rows = [[name, *(shown([run[dim] for run in runs]) for dim in dims)] for name, runs in stages.items()]
    return table(["", *dims], rows)


def plain(start):
    def made(entry):
        columns = [("sts", 384), ("sts", 64), ("sts", 16), ("sts", 8), ("probe", 16), ("probe", 8)]
        head = ["", "rate", *(f"{'topic ' * (measure == 'probe')}{dim}" for measure, dim in columns)]
        rows = [
            [label, rate(entry[name]), *(cell(entry[name], *column) for column in columns)]
            for name, label in PLAIN_ROWS.items()
        ]
        return table(head, rows)

    return made


def ablation(entry):
    names = {
        "matryoshka": "`MatryoshkaLoss`",
        "mipic-attention": "+ attention",
        "mipic-cka": "+ CKA",
        "mipic-pic": "+ PIC",
        "mipic": "all three",
    }
    columns = [(start, dim) for start in ("good", "weak") for dim in (384, 16, 8)]
    rows = [
        [label, *(f"{entry[start][name]['sts'][str(dim)]['mean']:.2f}" for start, dim in columns)]
        for name, label in names.items()
    ]
    return table(["", *(f"{start} {dim}" for start, dim in columns)], rows)


# in rotations.json: what has another name on the page
WAYS = {
    "ITQ": "ITQ (PCA to the largest dim, then rotated)",
    "rotation, pairs": "**rotation, pairs**",
    "rotation, texts only": "rotation, their texts only",
    "rotation, topics alone": "rotation, pairs of Banking77 alone",
}


def rotations(entry):
    dims = [column.split()[1] for column in entry["truncation"] if column.startswith("sts ")]
    columns = [*(f"sts {dim}" for dim in dims), *(f"1-NN {dim}" for dim in (64, 16, 8))]
    rows = [
        [
            WAYS.get(name, name),
            f"{about['seconds']:.1f}" if about["seconds"] > 0.05 else "",
            *(f"{about[column]:.1f}" for column in columns),
            # the other ways have no warning to give
            " ".join(map(str, about["warned"])) or ("none" if name.startswith("rotation") else ""),
        ]
        for name, about in entry.items()
    ]
    return table(["", "fit, s", *dims, "1-NN 64", "16", "8", "warns of"], rows)


def cuts(entry):
    bold = {name: f"**{name}**" if name.startswith("layer") and name.endswith("rotated") else name for name in entry}
    return table(
        ["", *next(iter(entry.values()))],
        [[bold[name], *(f"{value:.1f}" for value in by_dim.values())] for name, by_dim in entry.items()],
    )


def budgets(sets):
    """Percent of the full width's nDCG@10 that the best of int4, int8 and binary keeps, by bytes."""
    names, ways = ("Cranfield", "docstrings"), {"truncation": "truncated", "PCA": "PCA", "rotation": "rotated"}
    rows = []
    for size in ("8", "16", "32", "64", "128"):
        row = [size]
        for found in (sets[name.lower()] for name in names):
            full = found["full width"]["ndcg@10"]["mean"]
            best = {}
            for way in ways:
                cells = [found["bytes"][f"{way}, {code}"] for code in ("int4", "int8", "binary")]
                cell = max((cell[size] for cell in cells if size in cell), key=lambda cell: cell["ndcg@10"]["mean"])
                best[way] = round(100 * cell["ndcg@10"]["mean"] / full), cell["cell"]
            highest = max(best.values())[0]
            row += [
                (f"**{share}%**" if share == highest else f"{share}%") + (f" {cell}" if way == "rotation" else "")
                for way, (share, cell) in best.items()
            ]
        rows.append(row)
    headings = [f"{name}: {way}" if way == "truncated" else way for name in names for way in ways.values()]
    return table(["bytes", *headings], rows)


SETS = {
    "cranfield": "Cranfield",
    "docstrings": "docstrings",
    "banking77": "Banking77, intent search",
    "sentences": "sentences",
}
CORPUS_ROWS = {
    "truncation": "truncation, no training",
    "rotation": "**rotation of the documents, no training**",
    "matryoshka": "`MatryoshkaLoss`",
    "mipic": "`MIPICLoss`: SIA, no PIC",
    "rotation+matryoshka": "**rotation, then `MatryoshkaLoss`**",
    "rotation+mipic": "rotation, then `MIPICLoss`: SIA, no PIC",
    "rotation+mipic-pic": "rotation, then `MIPICLoss`: PIC, no SIA",
}
CORPUS_ROWS |= {
    f"{name}, rotated again": f"{label.replace('**', '')}; rotated again" for name, label in CORPUS_ROWS.items()
}


def over_seeds(found):
    return f"{found['mean']:.1f}" + (f" ±{found['std']:.1f}" if found["std"] else "")


def ours(row):
    return f"**{row}**" if row.startswith("rotation") else row


def search_dims(entry):
    """Every way at every dim, set by set."""
    rows, dims = [], []
    for name, found in entry.items():
        measure = found["measure"]
        dims = [*next(iter(found["dims"].values()))]
        rows.append([f"{SETS[name]}: full width", f"{found['full width'][measure]['mean']:.1f}", *[""] * len(dims)])
        for way, by_dim in found["dims"].items():
            rows.append([ours(way), "", *(over_seeds(by_dim[dim][measure]) for dim in dims)])
    return table(["", "full", *dims], rows)


def search_bytes(name):
    """Every way at every number of bytes, on one set."""

    def made(entry):
        found = entry[name]
        sizes = [*found["bytes"]["rotation, int8"]]
        rows = [
            [ours(row), *(over_seeds(by_size[size][found["measure"]]) if size in by_size else "" for size in sizes)]
            for row, by_size in found["bytes"].items()
        ]
        return table(["", *(f"{size} B" for size in sizes)], rows)

    return made


def over_opq(entry):
    """Our codes minus OPQ with PQ at equal bytes."""
    sizes = ("8", "16", "32", "64", "128")
    rows = [
        [f"{SETS[name]}: {row}", *(difference(by_size, size) for size in sizes)]
        for name, found in entry.items()
        for row, by_size in found["over OPQ"].items()
        if row != "rotation, int8"
    ]
    return table(["minus OPQ + PQ", *(f"{size} B" for size in sizes)], rows)


def fit_seconds(entry):
    """Seconds of the fits, beside those of OPQ and PQ at 32 bytes."""
    columns = ("PCA", "rotation", "OPQ + PQ, 32 bytes")
    rows = [
        [SETS[name], found["fitted on"], *(f"{found['seconds'][column]:.1f}" for column in columns)]
        for name, found in entry.items()
    ]
    return table(["", "fitted on", *columns], rows)


def corpus_scores(name):
    def made(entry):
        cells = [*entry[name]["rotation"]["ndcg@10"]]
        rows = [
            [label, rate(entry[name][row]), *(over_seeds(entry[name][row]["ndcg@10"][cell]) for cell in cells)]
            for row, label in CORPUS_ROWS.items()
            if row in entry[name]
        ]
        return table(["", "rate", *cells], rows)

    return made


def corpus_differences(name, over, head):
    def made(entry):
        cells = ("384", "64", "16", "8", "32 B", "16 B", "8 B")
        rows = [
            [label, *(difference(entry[name][row][over], cell) for cell in cells)]
            for row, label in CORPUS_ROWS.items()
            if over in entry[name].get(row, {}) and row not in ("truncation", "rotation")
        ]
        return table([head, *cells], rows)

    return made


def engines(rows):
    """What examples/serve_vectors.py has found."""
    recalls = ("truncated", "rotated", "rescored")
    cells = [
        [row["engine"], row["stored"], row["bytes"], *(f"{row[name]:.3f}" for name in recalls), f"{row['ms']:.2f}"]
        for row in rows
    ]
    return table(["engine", "stored", "bytes", *recalls, "ms"], cells)


def development(entry):
    """How the rate was chosen: mean over dims on the development queries, seed 0."""
    rows = []
    for name, found in entry.items():
        for row, by_rate in found["settings"]["rates"].items():
            best = max(by_rate.values())
            shown = [f"**{score:.1f}**" if score == best else f"{score:.1f}" for score in by_rate.values()]
            rows.append([f"{SETS[name]}: {CORPUS_ROWS[row].replace('**', '')}", *shown])
    return table(["", *(f"`{rate}`" for rate in by_rate)], rows)


# name of the table: (file, part of it, what makes the table)
TABLES = {
    "budgets": ("retrieval", "sets", budgets),
    "summary": ("rotated", "good", summary),
    "sts": ("rotated", "good", scores("sts")),
    "intent": ("rotated", "good", scores("accuracy@1")),
    "engines": ("engines", "rows", engines),
    "ndcg": ("rotated", "good", scores("ndcg@10")),
    "topics": ("rotated", "good", scores("topics")),
    "differences": ("rotated", "good", differences("rotation+mipic", "sts", (384, 256, 128, 64, 32, 16, 8))),
    "intent differences": ("rotated", "good", differences("rotation+mipic", "accuracy@1", (64, 32, 16, 8))),
    "layer 3 cut": ("rotated", "good", scores("sts, layer 3 cut", (384, 64, 32, 16, 8))),
    "layer 3 fitted": ("rotated", "good", scores("sts, layer 3 fitted", (384, 64, 32, 16, 8))),
    "more": ("more", "good", scores("sts", labels=MORE_ROWS)),
    "more teacher differences": (
        "more",
        "good",
        differences("rotation+mipic-teacher", "sts", (384, 256, 128, 64, 32, 16, 8)),
    ),
    "more layer 3 cut": ("more", "good", scores("sts, layer 3 cut", (384, 64, 16, 8), MORE_ROWS)),
    "more layer 3 fitted": ("more", "good", scores("sts, layer 3 fitted", (384, 64, 16, 8), MORE_ROWS)),
    "weak": ("weak", "weak", scores("sts")),
    "weak differences": ("weak", "weak", differences("mipic", "sts", (384, 256, 128, 64, 32, 16, 8))),
    "weak rotated differences": ("weak", "weak", differences("rotation+mipic", "sts", (384, 256, 128, 64, 32, 16, 8))),
    "weak more": ("weak more", "weak", scores("sts")),
    "weak later": ("weak rotated", "weak", scores("sts", labels=WEAK_ROWS)),
    "weak 16 differences": (
        "weak rotated",
        "weak",
        differences("rotation+specialist-16+rotation", "sts", (384, 256, 128, 64, 32, 16, 8)),
    ),
    "weak taught": ("weak taught", "weak", scores("sts", labels=TAUGHT_ROWS)),
    "weak taught differences": (
        "weak taught",
        "weak",
        differences("rotation+mipic-teacher", "sts", (384, 256, 128, 64, 32, 16, 8)),
    ),
    "second": ("second", "good", scores("sts", (768, 512, 256, 128, 64, 32, 16, 8))),
    "second differences": (
        "second",
        "good",
        differences("rotation+mipic", "sts", (768, 512, 256, 128, 64, 32, 16, 8)),
    ),
    "later": ("later", "good", scores("sts", labels=LATER_ROWS)),
    "later layer 3 cut": ("later", "good", scores("sts, layer 3 cut", (384, 64, 32, 16, 8), LATER_ROWS)),
    "later layer 3 fitted": ("later", "good", scores("sts, layer 3 fitted", (384, 64, 32, 16, 8), LATER_ROWS)),
    "later layer 3 differences": (
        "later",
        "good",
        differences("rotation+matryoshka-2d", "sts, layer 3 cut", (384, 64, 32, 16, 8)),
    ),
    "later layer 3 fitted differences": (
        "later",
        "good",
        differences("rotation+matryoshka-2d", "sts, layer 3 fitted", (384, 64, 32, 16, 8)),
    ),
    "curve": ("curve", "good", curve),
    "half depth": ("half", "scores", half_depth),
    "plain good": ("plain", "good", plain("good")),
    "plain weak": ("plain", "weak", plain("weak")),
    "ablation": ("plain", "ablation", ablation),
    "rotations": ("untrained", "rotations", rotations),
    "cuts": ("untrained", "cuts", cuts),
    "wide": ("wide", "rotations", rotations),
    "search dims": ("retrieval", "sets", search_dims),
    **{f"search {name}": ("retrieval", "sets", search_bytes(name)) for name in SETS},
    "search over OPQ": ("retrieval", "sets", over_opq),
    "search seconds": ("retrieval", "sets", fit_seconds),
    "trained rates": ("trained on pairs", "corpora", development),
    "search static dims": ("search static", "sets", search_dims),
    "search static": ("search static", "sets", search_bytes("cranfield")),
    "search static docstrings": ("search static", "sets", search_bytes("docstrings")),
    "search mpnet dims": ("search mpnet", "sets", search_dims),
    "search mpnet": ("search mpnet", "sets", search_bytes("cranfield")),
    **{f"trained {name}": ("trained on pairs", "corpora", corpus_scores(name)) for name in ("docstrings", "cranfield")},
    **{
        f"trained {name} {kind}": ("trained on pairs", "corpora", corpus_differences(name, over, head))
        for name in ("docstrings", "cranfield")
        for kind, over, head in (
            ("differences", "over the rotation", "minus the rotation, no training"),
            ("terms", "over MatryoshkaLoss", "minus `MatryoshkaLoss` in its place"),
        )
    },
}
MARKED = re.compile(r"(<!-- results: (.+?) -->\n\n)((?:\|.*\n)*)\n*")


def filled(text):
    """The document with every marked table made again."""

    def make(match):
        file, part, maker = TABLES[match[2]]
        return f"{match[1]}{maker(load(file)[part])}\n\n"

    return f"{MARKED.sub(make, text).rstrip()}\n"


if __name__ == "__main__":
    for each in DOCUMENTS:
        each.write_text(filled(each.read_text(encoding="utf-8")), encoding="utf-8")
