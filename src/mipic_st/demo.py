"""Synthetic English sentence pairs with graded similarity, made by this package from its own frames and word lists.

None of it was written or rated by people: use it to see training work offline, not to report quality. A frame is one
event in several wordings, with slots for words, synonyms, an optional detail and a negated wording
(``demo_frames.txt``). Training and evaluation have different frames and slot words, so they share no sentence. A seed
gives the same rows on every platform and Python version.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from itertools import combinations, cycle, islice, repeat
from typing import Literal, TypeVar

from mipic_st.validation import checked_count, is_whole, plain

Split = Literal["train", "eval"]
T = TypeVar("T")

SCORES = {"paraphrase": 1.0, "detail": 0.8, "change": 0.6, "contradiction": 0.4, "topic": 0.2, "unrelated": 0.0}
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

    Rows have an ``anchor``, a ``positive`` (a paraphrase, at times with a detail more or less) and, with ``negatives``,
    a ``negative``: a "change" or a "contradiction". No row repeats. ``split="eval"`` draws from the held-out frames and
    words. A ``size`` that the frames do not give is a ValueError.

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
        kind = "detail" if frame.has_detail and draw.chance(0.2) else "paraphrase"
        anchor, positive, wording = _paraphrase(draw, scene, kind)
        if anchor == positive:
            return None
        texts = {"anchor": anchor, "positive": positive}
        if negatives:
            kind = draw.pick(("change", "contradiction", "contradiction"))
            other = _different(draw, scene, corpus, kind, wording)
            if other is None or other in texts.values():
                return None
            texts["negative"] = other
        return texts

    return _take(repeat(row), size)


def synthetic_sts(size: int = 1500, *, seed: int = 0, split: Split = "eval") -> list[dict[str, str | float]]:
    """Synthetic sentence pairs with a similarity score, in the shape of an STS data set.

    Rows have ``sentence1``, ``sentence2``, ``score`` in [0, 1] and ``kind``, a key of :data:`SCORES`; the kinds take
    turns, and no pair repeats. Arguments are those of :func:`synthetic_pairs`.

    Example:
        >>> [row["kind"] for row in synthetic_sts(3)]
        ['paraphrase', 'detail', 'change']
    """
    corpus = _corpus(split)
    draw = _Draw(seed)
    with_detail = [frame for frame in corpus.frames if frame.has_detail]
    frames = {kind: draw.cycle(with_detail if kind == "detail" else corpus.frames) for kind in SCORES}

    def row(kind: str) -> dict[str, str | float] | None:
        frame = next(frames[kind])
        scene = draw.scene(frame, corpus)
        second: str | None
        if kind in ("paraphrase", "detail"):
            first, second, _ = _paraphrase(draw, scene, kind)
        else:
            wording = draw.pick(frame.same)
            first = _render(draw, wording, scene)
            if kind in ("change", "contradiction"):
                second = _different(draw, scene, corpus, kind, wording)
            else:
                near = kind == "topic"
                others = [each for each in corpus.frames if each is not frame and (each.topic == frame.topic) == near]
                other = draw.scene(draw.pick(others), corpus, like=scene)
                second = _render(draw, draw.pick(other.frame.same), other)
        if second is None or second == first:
            return None
        if not draw.chance(0.5):
            first, second = second, first
        return {"sentence1": first, "sentence2": second, "score": SCORES[kind], "kind": kind}

    return _take((partial(row, kind) for kind in cycle(SCORES)), size)


def synthetic_topics(size: int = 1000, *, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """Synthetic sentences labelled with their topic, for a small classification probe.

    Rows have ``text`` and ``label``, a topic such as ``"kitchen"``; the topics take turns, are the same in both splits,
    and no text repeats. Arguments are those of :func:`synthetic_pairs`.

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
        return [(one, two) for one, two in combinations(self.slots, 2) if self.slots[one] == self.slots[two]]


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


class _Draw:
    """Seeded draws that rest on ``Random.random`` alone, which Python promises never to change for a seed."""

    def __init__(self, seed: int) -> None:
        # Random takes the absolute value of a seed, and any other kind too
        self._random = random.Random(checked_count("seed", seed, least=0))

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random.random() * len(options))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        order = list(items)
        for i in range(len(order) - 1, 0, -1):
            j = int(self._random.random() * (i + 1))
            order[i], order[j] = order[j], order[i]
        return order

    def cycle(self, items: Sequence[T]) -> Iterator[T]:
        """All items in random order, again and again."""
        while True:
            yield from self.shuffled(items)

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


def _paraphrase(draw: _Draw, scene: Scene, kind: str) -> tuple[str, str, str]:
    """The scene in two wordings, for the kind "detail" one of them without the detail; and the first wording."""
    one, other, *_ = draw.shuffled(scene.frame.same)
    details = draw.shuffled([True, False]) if kind == "detail" else [scene.detail] * 2
    first = _render(draw, one, replace(scene, detail=details[0]))
    return first, _render(draw, other, replace(scene, detail=details[1])), one


def _different(draw: _Draw, scene: Scene, corpus: Corpus, kind: str, wording: str) -> str | None:
    """A sentence that changes or contradicts the scene, in half the cases in the given wording."""
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
    return _render(draw, wording, replace(scene, values=values))


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
    taken: dict[tuple[T, ...], dict[str, T]] = {}
    for turn in islice(turns, size):
        rows = (turn() for _ in range(_MAX_MISSES))
        row = next((row for row in rows if row is not None and tuple(row.values()) not in taken), None)
        if row is None:
            raise ValueError(f"size={size} is too large: the synthetic frames gave no new row after {len(taken)}.")
        taken[tuple(row.values())] = row
    return list(taken.values())


@cache
def _corpus(split: Split) -> Corpus:
    """Read the frames and words of one split."""
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}.")
    words: dict[str, tuple[tuple[str, ...], ...]] = {}
    frames: list[Frame] = []
    topic, held_out = "", False
    text = files("mipic_st").joinpath("demo_frames.txt").read_text(encoding="utf-8")
    for lines in (block.splitlines() for block in text.split("\n\n")):
        for line in lines:
            if line.startswith("@domain "):
                topic, held_out = line.removeprefix("@domain "), False
            elif line == "@heldout":
                held_out = True
            elif line[0] not in "#=!":
                name, values = line.split(": ", 1)
                kept = values.split(" || ")[split == "eval"]
                words[name] = tuple(tuple(value.split("/")) for value in kept.split("; "))
        same, opposite = (tuple(line[2:] for line in lines if line[0] == sign) for sign in "=!")
        if same and held_out == (split == "eval"):
            slots: dict[str, str] = {}
            for key, name in _slots_of(" ".join(same)):
                slots.setdefault(key, name)  # later wordings may say {a} for what the first introduced as {a:person}
            frames.append(Frame(topic, same, opposite, slots))
    return Corpus(tuple(frames), words)
