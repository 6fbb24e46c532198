"""What the attention of one forward pass reads from a cache."""

import operator
from typing import Any, NamedTuple

import mlx.core as mx

from ..codecs.kv_codec import Codes, KVCodec
from .exact import ExactTokens
from .passes import StepPlan


def _of_plan(name: str) -> Any:
    return property(operator.attrgetter(f"plan.{name}"))


class View(NamedTuple):
    """One layer's keys and values as the queries of one forward pass find them.

    Attributes:
        kernel: what runs the attention.
        exact_tokens: the sinks, then the positions ``exact_start``, ..., ``end`` - 1.
        key_codes, value_codes: of the positions ``first_coded``, ..., ``coded`` - 1.
        plan: who sees what of them; its attributes are the view's, too.
        laid_out: keys and values (B, H, T, D), sinks, decoded and exact tokens, if they
            have been put side by side already.
    """

    codec: KVCodec
    kernel: str
    exact_tokens: ExactTokens
    key_codes: Codes
    value_codes: Codes
    plan: StepPlan
    laid_out: tuple[mx.array, mx.array] | None = None

    visibility, ring = _of_plan("visibility"), _of_plan("ring")
    first_coded, coded = _of_plan("first_coded"), _of_plan("coded")
    start, end, queries = _of_plan("start"), _of_plan("end"), _of_plan("queries")
    is_prompt, forgets = _of_plan("is_prompt"), _of_plan("forgets")
    sinks, exact_start = _of_plan("sinks"), _of_plan("exact_start")
    exact_from, oldest, slot = _of_plan("exact_from"), _of_plan("oldest"), _of_plan("slot")

    @property
    def apart(self) -> "View":
        """The same, to be read without joining exact tokens that a kernel is to join."""
        return self._replace(exact_tokens=self.exact_tokens.apart())

    @property
    def whole(self) -> "View":
        """The same, but all queries see as far back as the first."""
        return self if self.plan.ring is None else self._replace(plan=self.plan.whole)

    def exact(self, first: int, last: int) -> tuple[mx.array, mx.array]:
        """Exact keys and values of the sinks and of the positions first, ..., last - 1."""
        if first == self.exact_start and last == self.end:
            return self.exact_tokens.keys, self.exact_tokens.values
        sinks, skip = self.sinks, self.sinks - self.exact_start
        keys, values = (
            mx.concatenate([x[:, :, :sinks], x[:, :, first + skip : last + skip]], axis=2)
            for x in (self.exact_tokens.keys, self.exact_tokens.values)
        )
        return keys, values

    def codes(self, first: int, last: int) -> tuple[Codes, Codes]:
        """Codes of keys and values of the positions first, ..., last - 1."""
        if (first, last) == (self.first_coded, self.coded):
            return self.key_codes, self.value_codes
        first, last = first - self.first_coded, last - self.first_coded
        return code_range(self.key_codes, self.value_codes, first, last)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All that the queries see, (B, H, T, D) in the model's dtype, codes dequantised."""
        oldest = self.oldest(0)[1]
        coded = max(oldest, min(self.coded, self.exact_from(self.end - 1)))
        exact = self.exact(coded, self.end)
        if coded == oldest:
            return exact
        key_codes, value_codes = self.codes(oldest, coded)
        decoded = (
            self.codec.decode_keys(key_codes, oldest),
            self.codec.decode_values(value_codes),
        )
        keys, values = (
            mx.concatenate(
                [x[:, :, : self.sinks], d.astype(x.dtype), x[:, :, self.sinks :]], axis=2
            )
            for x, d in zip(exact, decoded)
        )
        return keys, values


def code_range(key_codes: Codes, value_codes: Codes, first: int, last: int) -> tuple[Codes, Codes]:
    """The tokens first, ..., last - 1 of codes, in arrays of their own.

    Elementwise work on strided arrays is slow, copying packed codes is not.
    """
    return (
        tuple(_cut_last_axis(plane, first, last) for plane in key_codes),
        tuple(_cut_tokens(plane, first, last) for plane in value_codes),
    )


def _cut_last_axis(plane: mx.array, first: int, last: int) -> mx.array:
    # MLX copies words as fast as it copies bytes.
    if plane.dtype == mx.uint8 and not (first % 4 or last % 4 or plane.shape[-1] % 4):
        words = plane.view(mx.uint32)[..., first // 4 : last // 4]
        return mx.contiguous(words).view(mx.uint8)
    return mx.contiguous(plane[..., first:last])


def _cut_tokens(plane: mx.array, first: int, last: int) -> mx.array:
    if plane.dtype == mx.uint8 and plane.shape[-1] % 4 == 0:
        return mx.contiguous(plane.view(mx.uint32)[..., first:last, :]).view(mx.uint8)
    return mx.contiguous(plane[..., first:last, :])
