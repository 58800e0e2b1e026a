"""Synthetic English sentence pairs with graded similarity, made by this package from its own frames and word lists.

None of it was written or rated by people: use it to see training work offline, not to report quality. A frame is one
event in several wordings, with slots for words, synonyms, a detail that may be left out and a negated wording
(``demo_frames.txt``, next to this module). Training and evaluation use different frames and different slot
words, so they share no sentence. The same seed gives the same rows on every platform and Python version.

The score of a pair follows from how it was made:

| kind          | score | the second sentence                                                             |
|---------------|-------|---------------------------------------------------------------------------------|
| paraphrase    | 1.0   | says the same in another wording, with other synonyms, in another word order     |
| detail        | 0.8   | says the same, but a detail (when, where, why) is missing                        |
| change        | 0.6   | differs in one word or number: another colour, person, amount, city               |
| contradiction | 0.4   | says the opposite (negation), or swaps who does what to whom                      |
| topic         | 0.2   | tells of another event of the same topic, often with the same people or numbers   |
| unrelated     | 0.0   | tells of an event of another topic, often with the same people or numbers         |
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from itertools import cycle, islice, repeat
from typing import Literal, NamedTuple, TypeVar

from mipic_st.validation import checked_count, is_whole, plain

Split = Literal["train", "eval"]
T = TypeVar("T")

SCORES: dict[str, float] = {
    "paraphrase": 1.0,
    "detail": 0.8,
    "change": 0.6,
    "contradiction": 0.4,
    "topic": 0.2,
    "unrelated": 0.0,
}
"""Score of each kind of pair (the table in the module's docstring)."""

# Rows that repeat earlier ones are drawn again; after so many misses in a row there are taken to be no new ones.
_MAX_MISSES = 10_000

_SLOT = re.compile(r"\{(?:(\w+):)?(\w+)\}")
_DETAIL = re.compile(r"\[([^\]]*)\]")
_CHOICE = re.compile(r"\(([^()]*/[^()]*)\)")
# "an" before a vowel letter and before 8, 11, 18; not before the "you" and "one" sounds.
_ARTICLE = re.compile(r"\b([Aa]) (?=(?!uni|use|eu|one\b)[aeiou]|8|11\b|18\b)")


def synthetic_pairs(
    size: int = 4000, *, seed: int = 0, negatives: bool = True, split: Split = "train"
) -> list[dict[str, str]]:
    """Synthetic training pairs for contrastive losses such as ``MultipleNegativesRankingLoss``.

    Args:
        size: Number of rows, > 0.
        seed: Seed of the draw, an integer from 0 on.
        negatives: Whether to add a ``negative`` to each row: a "change" or a "contradiction" of the anchor, often in
            the anchor's own wording.
        split: ``"train"`` for the training frames and words, ``"eval"`` for the held-out ones.

    Returns:
        Rows with ``anchor``, ``positive`` (a paraphrase; where the frame has a detail, one of five times with it more
        or less) and, if asked for, ``negative``. No row repeats.

    Raises:
        ValueError: If ``size`` is not positive, ``seed`` is negative, ``split`` is unknown, or the frames do not give
            that many rows.

    Example:
        >>> sorted(synthetic_pairs(1)[0])
        ['anchor', 'negative', 'positive']
    """
    corpus = _corpus(split)
    draw = _Draw(seed)
    frames = draw.cycle(corpus.frames)

    def row() -> dict[str, str] | None:
        frame = next(frames)
        scene = draw.scene(frame, corpus)
        pair = _paraphrase(draw, scene, "detail" if frame.has_detail and draw.chance(0.2) else "paraphrase")
        if pair is None:
            return None
        texts = {"anchor": pair.first, "positive": pair.second}
        if negatives:
            kind = draw.pick(("change", "contradiction", "contradiction"))
            other = _different(draw, scene, corpus, kind, pair.wording)
            if other is None or other in texts.values():
                return None
            texts["negative"] = other
        return texts

    return _take(repeat(row), size)


def synthetic_sts(size: int = 1500, *, seed: int = 0, split: Split = "eval") -> list[dict[str, str | float]]:
    """Synthetic sentence pairs with a similarity score, in the shape of an STS data set.

    Args:
        size: Number of rows, > 0; the kinds of :data:`SCORES` take turns.
        seed: Seed of the draw, an integer from 0 on.
        split: ``"eval"`` for the held-out frames and words, ``"train"`` for those of :func:`synthetic_pairs`.

    Returns:
        Rows with ``sentence1``, ``sentence2``, ``score`` in [0, 1] and ``kind``, a key of :data:`SCORES`. No pair
        repeats.

    Raises:
        ValueError: If ``size`` is not positive, ``seed`` is negative, ``split`` is unknown, or the frames do not give
            that many rows.

    Example:
        >>> [row["kind"] for row in synthetic_sts(3)]
        ['paraphrase', 'detail', 'change']
    """
    corpus = _corpus(split)
    draw = _Draw(seed)
    with_detail = [frame for frame in corpus.frames if frame.has_detail]
    frames = {kind: draw.cycle(with_detail if kind == "detail" else corpus.frames) for kind in SCORES}

    def second_of(kind: str, scene: Scene, wording: str) -> str | None:
        if kind in ("change", "contradiction"):
            return _different(draw, scene, corpus, kind, wording)
        near = kind == "topic"
        frame = scene.frame
        others = [other for other in corpus.frames if other is not frame and (other.topic == frame.topic) == near]
        other = draw.scene(draw.pick(others), corpus, like=scene)
        return _render(draw, draw.pick(other.frame.same), other)

    def row(kind: str) -> dict[str, str | float] | None:
        scene = draw.scene(next(frames[kind]), corpus)
        if kind in ("paraphrase", "detail"):
            pair = _paraphrase(draw, scene, kind)
            if pair is None:
                return None
            texts: tuple[str, str | None] = (pair.first, pair.second)
        else:
            wording = draw.pick(scene.frame.same)
            texts = (_render(draw, wording, scene), second_of(kind, scene, wording))
        if texts[1] in (None, texts[0]):
            return None
        first, second = texts if draw.chance(0.5) else texts[::-1]
        return {"sentence1": first, "sentence2": second, "score": SCORES[kind], "kind": kind}  # type: ignore[dict-item]

    return _take((partial(row, kind) for kind in cycle(SCORES)), size)


def synthetic_topics(size: int = 1000, *, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """Synthetic sentences labelled with their topic, for a small classification probe.

    Args:
        size: Number of rows, > 0; the topics take turns.
        seed: Seed of the draw, an integer from 0 on.
        split: ``"train"`` or ``"eval"``: different frames and words, the same topics.

    Returns:
        Rows with ``text`` and ``label``, a topic such as ``"kitchen"``. No text repeats.

    Raises:
        ValueError: If ``size`` is not positive, ``seed`` is negative, ``split`` is unknown, or the frames do not give
            that many rows.

    Example:
        >>> sorted(synthetic_topics(1)[0])
        ['label', 'text']
    """
    corpus = _corpus(split)
    draw = _Draw(seed)
    topics = list(dict.fromkeys(frame.topic for frame in corpus.frames))

    frames = {topic: draw.cycle([frame for frame in corpus.frames if frame.topic == topic]) for topic in topics}

    def row(topic: str) -> dict[str, str]:
        scene = draw.scene(next(frames[topic]), corpus)
        return {"text": _render(draw, draw.pick(scene.frame.same), scene), "label": topic}

    return _take((partial(row, topic) for topic in cycle(topics)), size)


@dataclass(frozen=True)
class Frame:
    """One event: its wordings, the opposite, and the word list of each slot."""

    topic: str
    same: tuple[str, ...]
    opposite: tuple[str, ...]
    slots: dict[str, str]

    @property
    def has_detail(self) -> bool:
        """Whether a part may be left out."""
        return "[" in self.same[0]

    @property
    def swaps(self) -> list[tuple[str, str]]:
        """Pairs of slots on one word list: their values can change places."""
        keys = list(self.slots)
        return [(one, two) for i, one in enumerate(keys) for two in keys[i + 1 :] if self.slots[one] == self.slots[two]]


@dataclass(frozen=True)
class Corpus:
    """Frames of one split, and the values (each with its synonyms) of every word list."""

    frames: tuple[Frame, ...]
    words: dict[str, tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Scene:
    """A frame with a value in each slot."""

    frame: Frame
    values: dict[str, tuple[str, ...]]
    detail: bool


class Paraphrase(NamedTuple):
    """Two sentences of one meaning, and the wording of the first."""

    first: str
    second: str
    wording: str


class _Draw:
    """Seeded draws that rest on ``Random.random`` alone, which Python promises never to change for a seed."""

    def __init__(self, seed: int) -> None:
        # Random takes the absolute value of a seed, and any other kind too
        self._random = random.Random(checked_count("seed", seed, least=0))

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random.random() * len(options))]

    def shuffle(self, items: MutableSequence[T]) -> None:
        for i in range(len(items) - 1, 0, -1):
            j = int(self._random.random() * (i + 1))
            items[i], items[j] = items[j], items[i]

    def cycle(self, items: Sequence[T]) -> Iterator[T]:
        """All items in random order, again and again."""
        while True:
            order = list(items)
            self.shuffle(order)
            yield from order

    def scene(self, frame: Frame, corpus: Corpus, like: Scene | None = None) -> Scene:
        """Fill the slots; where ``like`` has a value of the same word list, take that one."""
        shared = {} if like is None else {like.frame.slots[key]: value for key, value in like.values.items()}
        values: dict[str, tuple[str, ...]] = {}
        for key, name in frame.slots.items():
            # Two slots on one list never get the same value.
            options = [value for value in corpus.words[name] if value not in values.values()]
            value = shared.get(name)
            values[key] = value if value in options else self.pick(options)
        return Scene(frame, values, detail=frame.has_detail and self.chance(0.5))


def _paraphrase(draw: _Draw, scene: Scene, kind: str) -> Paraphrase | None:
    """The scene in two wordings; for the kind "detail", one of them without the detail."""
    order = list(scene.frame.same)
    draw.shuffle(order)
    details = [scene.detail, scene.detail]
    if kind == "detail":
        details = [True, False]
        draw.shuffle(details)
    first, second = (
        _render(draw, wording, Scene(scene.frame, scene.values, detail))
        for wording, detail in zip(order[:2], details, strict=True)
    )
    return None if first == second else Paraphrase(first, second, order[0])


def _different(draw: _Draw, scene: Scene, corpus: Corpus, kind: str, wording: str) -> str | None:
    """A sentence that changes or contradicts the scene, in half of the cases in the given wording."""
    frame = scene.frame
    values = dict(scene.values)
    if kind == "contradiction":
        if not frame.swaps or draw.chance(0.5):
            return _render(draw, draw.pick(frame.opposite), scene)
        one, two = draw.pick(frame.swaps)
        values[one], values[two] = values[two], values[one]
    else:
        visible = [key for key, _ in _slots_of(_shown(wording, scene.detail))]
        if not visible:
            return None
        key = draw.pick(visible)
        values[key] = draw.pick([v for v in corpus.words[frame.slots[key]] if v not in scene.values.values()])
    if draw.chance(0.5):
        wording = draw.pick(frame.same)
    return _render(draw, wording, Scene(frame, values, scene.detail))


def _render(draw: _Draw, wording: str, scene: Scene) -> str:
    """Write a scene down: choose synonyms, fill slots, set articles, capitals and the full stop."""
    text = _shown(wording, scene.detail)
    text = _CHOICE.sub(lambda match: draw.pick(match[1].split("/")), text)
    text = _SLOT.sub(lambda match: draw.pick(scene.values[match[1] or match[2]]), text)
    text = re.sub(r" +([?., ])", r"\1", text.strip())  # a detail left out may leave its space behind
    text = _ARTICLE.sub(r"\1n ", text)
    text = re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    return text if text.endswith((".", "?")) else text + "."


def _shown(wording: str, detail: bool) -> str:
    return _DETAIL.sub(r"\1" if detail else "", wording)


def _slots_of(wording: str) -> list[tuple[str, str]]:
    """(key, word list) of each slot in a wording; a slot without a key is its own key."""
    return [(match[1] or match[2], match[2]) for match in _SLOT.finditer(wording)]


def _take(turns: Iterator[Callable[[], dict[str, T] | None]], size: int) -> list[dict[str, T]]:
    """Let each turn draw until it gives a new row (None is a miss), so that no turn is lost to a repetition."""
    size = plain(size)
    if not is_whole(size) or size < 1:
        raise ValueError(f"size must be a positive integer, got {size!r}.")
    taken: list[dict[str, T]] = []
    seen: set[tuple[T, ...]] = set()
    for turn in islice(turns, size):
        for _ in range(_MAX_MISSES):
            row = turn()
            if row is not None and (identity := tuple(row.values())) not in seen:
                break
        else:
            raise ValueError(f"size={size} is too large: the synthetic frames gave no new row after {len(taken)}.")
        seen.add(identity)
        taken.append(row)
    return taken


@cache
def _corpus(split: Split) -> Corpus:
    """Read the frames and words of one split."""
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}.")
    words: dict[str, tuple[tuple[str, ...], ...]] = {}
    frames: list[Frame] = []
    topic, held_out = "", False
    lines: list[str] = []
    text = files("mipic_st").joinpath("demo_frames.txt").read_text(encoding="utf-8")
    for line in [*text.splitlines(), ""]:
        if line.startswith(("= ", "! ")):
            lines.append(line)
            continue
        if lines and held_out == (split == "eval"):
            frames.append(_frame(topic, lines))
        lines = []
        if line.startswith("@domain "):
            topic, held_out = line.removeprefix("@domain "), False
        elif line == "@heldout":
            held_out = True
        elif line and not line.startswith("#"):
            name, values = line.split(": ", 1)
            kept = values.split(" || ")[split == "eval"]
            words[name] = tuple(tuple(value.split("/")) for value in kept.split("; "))
    return Corpus(tuple(frames), words)


def _frame(topic: str, lines: list[str]) -> Frame:
    same = tuple(line[2:] for line in lines if line[0] == "=")
    opposite = tuple(line[2:] for line in lines if line[0] == "!")
    slots: dict[str, str] = {}
    for wording in same:
        for key, name in _slots_of(wording):
            # Later wordings may say {a} for a slot that the first one introduced as {a:person}.
            slots.setdefault(key, name)
    return Frame(topic, same, opposite, slots)
