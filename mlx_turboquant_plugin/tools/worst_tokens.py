"""The single tokens at which a run is farthest from the exact one, in words."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .tables import Column, table
from .teacher_forcing import Divergence

# So many of each arm, with so many tokens before them.
WORST = 5
CONTEXT = 16
SHOWN_CHARACTERS = 48


@dataclass(frozen=True)
class WorstToken:
    """A place with a large KL.

    Attributes:
        window, position: where in the text; the position is the last one read.
        kl: KL(exact || run) there, nats.
        context: the text up to there.
        exact, said: the token that the exact run and this one hold likeliest.
        text: the token that follows in the text; None at the end of a window.
        exact_probability, probability: of that token, in either run; None with it.
    """

    window: int
    position: int
    kl: float
    context: str
    exact: str
    said: str
    text: str | None
    exact_probability: float | None
    probability: float | None


def worst_tokens(
    tokenizer: Any, windows: Sequence[np.ndarray], found: Sequence[Divergence]
) -> list[WorstToken]:
    """The places of the largest KL over all windows, the largest first.

    Args:
        windows: token ids (L,) of each window.
        found: the run's divergence in each.
    """
    places = [
        (float(kl), w, at)
        for w, part in enumerate(found)
        for at, kl in enumerate(part.kls)
        if kl > 0
    ]
    places.sort(key=lambda place: -place[0])
    return [_token(tokenizer, windows[w], found[w], kl, w, at) for kl, w, at in places[:WORST]]


def _token(
    tokenizer: Any, tokens: np.ndarray, part: Divergence, kl: float, window: int, at: int
) -> WorstToken:
    def words(ids: Iterable[int]) -> str:
        return tokenizer.decode([int(one) for one in ids])

    context = words(tokens[max(0, at + 1 - CONTEXT) : at + 1])
    said = words([part.exact_choices[at]]), words([part.choices[at]])
    if at == len(part.nlls):
        return WorstToken(window, at, kl, context, *said, None, None, None)
    probabilities = (float(np.exp(-x[at])) for x in (part.exact_nlls, part.nlls))
    return WorstToken(window, at, kl, context, *said, words([tokens[at + 1]]), *probabilities)


COLUMNS = [
    Column("arm", "<", lambda row: row[0]),
    Column("KL, nats", ">", lambda row: f"{row[1].kl:.1e}"),
    Column("after", ">", lambda row: shortened(row[1].context)),
    Column("exact", "<", lambda row: repr(row[1].exact)),
    Column("arm's", "<", lambda row: repr(row[1].said)),
    Column("text", "<", lambda row: "" if row[1].text is None else repr(row[1].text)),
    Column("text's probability: exact, arm's", ">", lambda row: probabilities(row[1])),
]


def lines(rows: Sequence[tuple]) -> Iterator[str]:
    """The lines of a table for a terminal; ``rows`` are pairs of an arm's name and a token."""
    yield "tokens with the largest KL: what each run would have said, and what the text says"
    yield from table(COLUMNS, rows)


def shortened(context: str) -> str:
    """The end of a context on one line."""
    return " ".join(context.split())[-SHOWN_CHARACTERS:]


def probabilities(token: WorstToken) -> str:
    """Of the token of the text: the exact run's and the arm's."""
    if token.text is None:
        return ""
    return f"{token.exact_probability:.1%}, {token.probability:.1%}"
