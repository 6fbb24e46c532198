"""Retrieval and tracking with known answers: four kinds of RULER's tasks in words of our own.

After RULER (arXiv 2404.06654), for models that continue text and follow no instructions:
each prompt ends in a sentence that the answer completes. Everything follows from a seed.

- passkey: one sentence in the context tells the secret word.
- keys: four sentences tell the words of four cities; one of them is asked for.
- variables: three things each change hands twice; one way is shown, that of another asked for.
- words: the word that occurs most often among many.
"""

import itertools
import random
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..rules import SettingsError

WORDS = (
    "garden river stone window market bridge island forest mountain valley engine letter prison "
    "doctor farmer soldier teacher captain king lady silver gold copper iron sugar bread wine "
    "coffee cotton paper glass ship train horse sheep"
).split()
CITIES = "London Paris Berlin Boston Chicago Madrid Athens Rome".split()
NAMES = "John Mary Peter George Henry James William Robert Charles Thomas Edward Anna".split()
PEOPLE = (
    "The old man", "A young woman", "The judge", "The driver", "My friend", "A visitor",
    "The sailor", "The writer",
)  # fmt: skip
ACTIONS = (
    "walked to", "looked at", "talked about", "wrote about", "went back to", "came from",
    "thought of", "left",
)  # fmt: skip
PLACES = (
    "the house", "the church", "the town", "the school", "the road", "the water", "the country",
    "the hotel",
)  # fmt: skip
CANDIDATES = 8
KEYS = 4
# Beyond this depth nothing is put: the newest tokens are in full precision.
DEEPEST = 0.8
# What a task tells and asks takes fewer tokens of any tokenizer that is of use.
LONGEST_NEEDED = 4096
# A word in so many tokens of the context, and which share of them is the one asked for.
WORD_EVERY, COMMON_SHARE = 16, 1 / 3


@dataclass(frozen=True)
class Kind:
    """What a prompt is counted by.

    Attributes:
        length: tokens at most.
        depth: where in the context the answer begins, 0 to 1; "words" are everywhere.
        choices: how many answers there are to choose from.
    """

    task: str
    length: int
    depth: float
    choices: int


@dataclass(frozen=True)
class Prompt:
    """A context, a question about it and what may follow; all are token ids.

    Attributes:
        context, question: (C,) and (Q,), together at most ``kind.length`` tokens.
        answer: the right one.
        others: wrong ones.
    """

    kind: Kind
    context: mx.array
    question: mx.array
    answer: list[int]
    others: list[list[int]]


@dataclass(frozen=True)
class _Draft:
    """A prompt in words: ``facts`` are sentences and their depths."""

    facts: Sequence[tuple[float, str]]
    question: str
    answer: str
    others: Sequence[str]


def _passkey(rng: random.Random, depth: float, room: int) -> _Draft:
    word, *others = rng.sample(WORDS, CANDIDATES)
    fact = f"The secret word is {word}. Remember that the secret word is {word}."
    return _Draft([(depth, fact)], "What is the secret word? The secret word is", word, others)


def _keys(rng: random.Random, depth: float, room: int) -> _Draft:
    word, *others = rng.sample(WORDS, KEYS)
    city, *other_cities = rng.sample(CITIES, KEYS)
    facts = [(depth, f"The word of {city} is {word}.")]
    facts += [
        (DEEPEST * rng.random(), f"The word of {other} is {its}.")
        for other, its in zip(other_cities, others)
    ]
    question = f"What is the word of {city}? The word of {city} is"
    return _Draft(facts, question, word, others)


def _variables(rng: random.Random, depth: float, room: int) -> _Draft:
    things, names = rng.sample(WORDS, 3), rng.sample(NAMES, 9)
    shown, asked, third = names[:3], names[3:6], names[6:]
    facts: list[tuple[float, str]] = []
    for thing, chain in zip(things, (shown, asked, third)):
        depths = sorted(DEEPEST * rng.random() for _ in chain)
        if chain is asked:
            depths = [depth + (DEEPEST - depth) * link / 3 for link in range(3)]
        facts += zip(depths, _way(thing, chain))
    start = f"The {things[1]} went to"
    shown_way = " ".join(_way(things[0], shown))
    question = f"Where is the {things[0]}? {shown_way} Where is the {things[1]}? {start}"

    def end(chain: list[str]) -> str:
        return " ".join(_way(things[1], chain)).removeprefix(start).strip(" .")

    wrong = (third, asked[:1] + third[1:], asked[:2] + third[2:], asked[:2] + shown[2:])
    return _Draft(facts, question, end(asked), [end(chain) for chain in wrong])


def _way(thing: str, chain: list[str]) -> list[str]:
    first, second, third = chain
    return [
        f"The {thing} went to {first}.",
        f"{first} passed it to {second}.",
        f"{second} passed it to {third}.",
    ]


def _words(rng: random.Random, depth: float, room: int) -> _Draft:
    word, *others = rng.sample(WORDS, 2 * CANDIDATES)
    count = max(2 * CANDIDATES, room // WORD_EVERY)
    common = round(COMMON_SHARE * count)
    listed = [word] * common + [others[i % len(others)] for i in range(count - common)]
    facts = [(DEEPEST * rng.random(), f"The next word is {one}.") for one in listed]
    question = "Which word comes most often? The word that comes most often is"
    return _Draft(facts, question, word, others[: CANDIDATES - 1])


TASKS: dict[str, Callable[[random.Random, float, int], _Draft]] = {
    "passkey": _passkey,
    "keys": _keys,
    "variables": _variables,
    "words": _words,
}


def depth(text: str) -> float:
    """An argparse type: a share of a prompt, from 0 to the deepest place."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= DEEPEST:
        raise ArgumentTypeError(f"{text!r} is not a share from 0 to {DEEPEST}")
    return share


class Prompts:
    """Prompts of each task and length, made one by one; they take the depths in turn."""

    def __init__(self, tokenizer: Any, count: int, lengths: Sequence[int], depths: Sequence[float]):
        """Make ``count`` prompts of each of ``TASKS`` and each of ``lengths``.

        Raises:
            SettingsError: a length leaves no room for what is told and asked.
        """
        self.count, self.lengths, self.depths = count, lengths, depths
        self._ids = lru_cache(maxsize=None)(
            lambda text: tokenizer.encode(f" {text}", add_special_tokens=False)
        )
        self._bos = tokenizer.encode("") if count else []
        for length in lengths:
            if crowded := self._crowded(length):
                raise SettingsError(self._too_short(length, crowded))

    def __len__(self) -> int:
        return self.count * len(TASKS) * len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of all contexts together, about: as many as they may have."""
        return self.count * len(TASKS) * sum(self.lengths)

    def __iter__(self) -> Iterator[Prompt]:
        for task, length, index in itertools.product(TASKS, self.lengths, range(self.count)):
            draft, rng = self._draft(task, length, index)
            question = self._ids(draft.question)
            context = self._context(rng, draft, self._spare(draft, length))
            yield Prompt(
                Kind(task, length, self._depth(index), 1 + len(draft.others)),
                mx.array(self._bos + context),
                mx.array(question),
                self._ids(draft.answer),
                [self._ids(other) for other in draft.others],
            )

    def _depth(self, index: int) -> float:
        return self.depths[index % len(self.depths)]

    def _draft(self, task: str, length: int, index: int) -> tuple[_Draft, random.Random]:
        rng = random.Random(f"{task} {length} {index}")
        return TASKS[task](rng, self._depth(index), length), rng

    def _spare(self, draft: _Draft, length: int) -> int:
        """Tokens that are left for sentences that say nothing; negative if some are missing."""
        told = sum(len(self._ids(fact)) for _, fact in draft.facts)
        return length - len(self._bos) - len(self._ids(draft.question)) - told

    def _crowded(self, length: int) -> str | None:
        """The first task that has no room in so many tokens, or None."""
        for task, index in itertools.product(TASKS, range(self.count)):
            if self._spare(self._draft(task, length, index)[0], length) < 0:
                return task
        return None

    def _too_short(self, length: int, task: str) -> str:
        longer = range(length + 1, LONGEST_NEEDED)
        enough = next((one for one in longer if not self._crowded(one)), None)
        advice = "leave out --tasks" if enough is None else f"for all tasks {enough} are enough"
        return (
            f"--task-lengths has {length}, too few tokens of this tokenizer for what the task "
            f"{task} tells and asks: {advice}"
        )

    def _context(self, rng: random.Random, draft: _Draft, room: int) -> list[int]:
        """The facts among sentences that say nothing, of which ``room`` tokens at most are."""
        filler: list[list[int]] = []
        while True:
            sentence = self._ids(
                f"{rng.choice(PEOPLE)} {rng.choice(ACTIONS)} {rng.choice(PLACES)}."
            )
            room -= len(sentence)
            if room < 0:
                break
            filler.append(sentence)
        placed = sorted(draft.facts, key=lambda fact: fact[0])
        context: list[int] = []
        for index in range(len(filler) + 1):
            while placed and placed[0][0] * len(filler) <= index:
                context += self._ids(placed.pop(0)[1])
            context += filler[index] if index < len(filler) else []
        return context
