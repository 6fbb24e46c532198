"""Which file of the disk cache a prompt is read from."""

import random
import tracemalloc
from pathlib import Path

import pytest

from mlx_turboquant_plugin.serving.disk_files import Entry
from mlx_turboquant_plugin.serving.prompt_index import PromptIndex

TOKENS = list(range(100))


def entry(name, trimmable=True):
    return Entry(Path(name), trimmable, 1000)


@pytest.fixture
def index():
    return PromptIndex(
        [
            (TOKENS[:40], entry("40")),
            (TOKENS[:60] + [7] * 500, entry("far longer")),
            (TOKENS[:80], entry("a state", False)),
            ([5, *TOKENS], entry("other")),
        ]
    )


@pytest.mark.parametrize(
    "prompt, known, expected",
    [
        (TOKENS, 0, ("a state", 80)),
        # A state can't be cut, and of the next too little is shared.
        (TOKENS[:80], 0, ("40", 40)),
        (TOKENS[:70], 0, ("40", 40)),
        (TOKENS[:60] + [7] * 20, 0, ("far longer", 79)),
        # Some token has to be left.
        (TOKENS[:40], 0, ("40", 39)),
        (TOKENS[:41], 0, ("40", 40)),
        # So many are in memory that reading it isn't worth while.
        (TOKENS[:50], 36, None),
        (TOKENS[:50], 35, ("40", 40)),
        ([99], 0, None),
        ([], 0, None),
    ],
)
def test_the_longest_that_is_worth_reading(index, prompt, known, expected):
    found = index.longest(prompt, known)
    assert (found and (str(found.entry.path), found.common)) == expected


def test_beginnings(index):
    assert [str(one.entry.path) for one in index.beginnings(TOKENS)] == ["40", "a state"]
    assert [one.length for one in index.beginnings(TOKENS[:40])] == [40]
    index.drop(Path("40"))
    index.drop(Path("unknown"))
    assert index.beginnings(TOKENS[:40]) == []


def test_a_token_takes_four_bytes():
    prompts = [random.Random(seed).choices(range(10**5), k=8000) for seed in range(20)]
    tracemalloc.start()
    index = PromptIndex([])
    for number, tokens in enumerate(prompts):
        index.add(tokens, entry(str(number)))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 20 * (4 * 8000 + 2000)
    assert index.longest(prompts[7], 0).common == 7999
