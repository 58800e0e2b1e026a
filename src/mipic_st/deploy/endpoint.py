"""A running server compared with the model: a missing Dense layer shows in vectors, not in full-width cosines."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from mipic_st.deploy.written import vectors_with
from mipic_st.encoder.encoding import PROBE_TEXTS, encode_texts
from mipic_st.encoder.modules import kind_of, pooling_like, pooling_place
from mipic_st.encoder.structure import evaluation_mode, full_width, unwrap
from mipic_st.numerics import unit_length
from mipic_st.validation import checked_dims, checked_number, checked_texts

# Of the answer, for each text: 8,192 dims with 24 letters each, and more.
_MOST_BYTES = 2**20
_LEFT_OUT = {
    "WordWeights": "its vectors have no word weights: the server leaves WordWeights out, fit the cut with "
    "word_weights=False",
    "Dense": "its vectors are those in front of the Dense layers: the server leaves them out",
}


@dataclass(frozen=True)
class EndpointCheck:
    """A server's vectors compared with the model's.

    Attributes:
        agrees: Whether they are the model's vectors at this dim, at unit length.
        worst: Largest distance between a vector of the server, at unit length, and the model's.
        findings: What is wrong, in words; empty if nothing is.
    """

    agrees: bool
    worst: float
    findings: tuple[str, ...]


def check_endpoint(
    model: SentenceTransformer,
    url: str,
    dim: int | None = None,
    *,
    name: str = "model",
    texts: Sequence[str] = PROBE_TEXTS,
    api_key: str | None = None,
    tolerance: float = 0.02,
    timeout: float = 30.0,
) -> EndpointCheck:
    """Compare the vectors of an OpenAI-compatible endpoint with the model's own.

    Not cosines: a server that leaves a rotation out gives the same cosines at full width, but other vectors.

    Args:
        model: The model that the server is meant to serve.
        url: Address of the server, e.g. ``http://localhost:8000``, or of its route, ending with ``/embeddings``.
        dim: Dims to ask the server for (``dimensions`` in the request). None asks for the full width.
        name: The model's name in the request.
        texts: What is embedded, without a prompt.
        api_key: Sent as a bearer token, to this address only: redirects are not followed, proxies only for https.
        tolerance: Largest distance that counts as equal; servers compute in half precision.
        timeout: Seconds for the whole answer.

    Returns:
        :class:`EndpointCheck`.

    Raises:
        TypeError: If ``texts`` is no list of texts.
        ValueError: If the address is none, ``dim`` is out of range, or the answer is no list of vectors.
        ConnectionError: If the server cannot be reached, refuses the request or sends it on to another address.

    Example:
        >>> check_endpoint(model, "http://localhost:8000", dim=64).findings  # doctest: +SKIP
        ()
    """
    _require_address(url)
    model = unwrap(model)
    width = full_width(model)
    (wanted,) = (width,) if dim is None else checked_dims("dim", [dim], width)
    tolerance = checked_number("tolerance", tolerance, 0, exclusive=True)
    timeout = checked_number("timeout", timeout, 0, threading.TIMEOUT_MAX, exclusive=True)
    if api_key is not None and not (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key must be a text of ASCII characters without line ends, as a header of HTTP is.")
    texts = checked_texts("texts", texts)
    served = _ask(url, texts, None if dim is None else wanted, name, api_key, timeout)
    with evaluation_mode(model):
        own = encode_texts(model, texts)
    given = served.shape[1]
    findings = []
    if given != wanted:
        findings.append(f"it gives {given} dims where {wanted} were asked for: truncate and normalise them")
    lengths = np.linalg.norm(served, axis=1)
    if np.abs(lengths - 1).max() > 0.01:
        findings.append(f"its vectors have lengths from {lengths.min():.3f} to {lengths.max():.3f}: normalise them")
    common = min(given, width)
    worst = _distance(served[:, :common], own[:, :common])
    if not worst <= tolerance:
        for finding, vectors in _misread(model, texts):
            if vectors.shape[1] >= given and _distance(served, vectors[:, :given]) <= tolerance:
                findings.append(finding)
                break
        else:
            findings.append(f"its vectors differ from the model's by {worst:.2f}")
    return EndpointCheck(not findings, worst, tuple(findings))


def _require_address(url: Any) -> None:
    """Refuse what is no address, or has a password in it, which errors would show."""
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        fine = fine and url.isascii() and url.isprintable() and " " not in url
    except (ValueError, AttributeError):  # of a part that cannot be read, of no text
        fine = False
    if fine and not (parts.username or parts.query or parts.fragment):
        return
    shown = str(url).rpartition("@")[2].partition("?")[0]
    raise ValueError(
        f"url must begin with http:// or https://, then a host, in ASCII, no user, password or query, got {shown!r}."
    )


def _distance(vectors: np.ndarray, others: np.ndarray) -> float:
    return float(np.linalg.norm(unit_length(vectors) - unit_length(others), axis=1).max())


def _misread(model: SentenceTransformer, texts: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """What a server gives that adds a prompt, skips modules or pools as it likes, and how to say so."""
    for name, prompt in model.prompts.items():
        if prompt:
            with evaluation_mode(model):
                vectors = encode_texts(model, texts, prompt=prompt)
            where = f"the model's prompt {name!r} in front, {prompt!r}: the server adds it to every text"
            yield f"its vectors are those of texts with {where}", vectors
    modules: list[Any] = list(model.children())
    kinds = [kind_of(module) for module in modules]
    place = pooling_place(model)
    own = "" if place < 0 else modules[place].pooling_mode
    modes = ["mean", "cls", "lasttoken"] if own else []
    skips = [kind for kind in _LEFT_OUT if kind in kinds]
    sets = [skipped for count in range(len(skips) + 1) for skipped in itertools.combinations(skips, count)]
    mistakes = [(mode, skipped) for mode in [own, *(mode for mode in modes if mode != own)] for skipped in sets]
    # fewest mistakes first, the first being none
    for mode, skipped in sorted(mistakes[1:], key=lambda mistake: (mistake[0] != own) + len(mistake[1])):
        said = [_LEFT_OUT[kind] for kind in skipped]
        kept = [module for module, kind in zip(modules, kinds, strict=True) if kind not in skipped]
        if mode != own:
            kept = [pooling_like(module, mode=mode) if module is modules[place] else module for module in kept]
            pooled = f"its vectors are pooled by {mode!r} where the model has {own!r}"
            said.insert(0, f"{pooled}: the server does not read the pooling")
        yield "; ".join(said), vectors_with(model, kept, texts)


def _ask(url: str, texts: list[str], dim: int | None, name: str, api_key: str | None, timeout: float) -> np.ndarray:
    """The server's vectors, in the order of the texts."""
    url = url.rstrip("/")
    route = url if url.endswith("/embeddings") else f"{url}{'' if url.endswith('/v1') else '/v1'}/embeddings"
    body: dict[str, Any] = {"model": name, "input": texts, "encoding_format": "float"}
    if dim is not None:
        body["dimensions"] = dim
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        request = urllib.request.Request(route, json.dumps(body).encode(), headers)
        status, given = _within(timeout, lambda: _answer(request, timeout, _MOST_BYTES * len(texts)))
    except (OSError, http.client.HTTPException) as error:  # the second is what no HTTP server, or no address, gives
        raise ConnectionError(f"{route} cannot be reached: {_printable(error)}; is the server running?") from error
    if 300 <= status < 400:
        raise ConnectionError(
            f"{route} sends the request on to {_printable(given)!r} (status {status}), where nothing was sent, the key "
            "neither; if that is the server, give its address."
        )
    if not 200 <= status < 300:
        hint = "; if its route is another one, give it whole, as in http://host:port/embeddings"
        said = _printable(given[:500]) + (hint if status == 404 else "")
        raise ConnectionError(f"{route} refuses the request with status {status}: {said}")
    try:
        rows = sorted(json.loads(given)["data"], key=lambda row: row["index"])
        vectors = np.asarray([row["embedding"] for row in rows], dtype=np.float32)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{route} answers with something else than OpenAI's embeddings: {given[:200]!r}.") from error
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"{route} answers {len(texts)} texts with an array of shape {vectors.shape}.")
    return vectors


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address is the caller's choice: the key is for the given one only."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _answer(request: urllib.request.Request, timeout: float, most_bytes: int) -> tuple[int, bytes]:
    """Status and body; for a redirect, the address instead of the body."""
    try:
        # a proxy would read what is sent by http
        proxies = {name: proxy for name, proxy in urllib.request.getproxies().items() if name == "https"}
        opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler(proxies))
        answer = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        if 300 <= answer.status < 400:
            return answer.status, answer.headers.get("Location", "nowhere").encode()
        body = answer.read(most_bytes + 1)
    if len(body) > most_bytes:
        raise OSError(f"it sends more than {most_bytes / 1e6:.0f} million bytes")
    return answer.status, body


def _within(seconds: float, work: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
    """The result of the work, or an error after so many seconds; a socket's timeout begins again with each byte."""
    result: Future[tuple[int, bytes]] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"timed out, it gave no whole answer in {seconds:g} s") from None


def _printable(given: object) -> str:
    """What a server said, without what would move the cursor of a terminal."""
    text = given.decode(errors="replace") if isinstance(given, bytes) else str(given)
    return "".join(letter if letter.isprintable() else " " for letter in text)
