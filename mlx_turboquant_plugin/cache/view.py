"""What the attention of one forward pass reads from a cache."""

from typing import NamedTuple

import mlx.core as mx

from ..backends import Backend, support
from ..backends.tokens import Places
from ..codecs.kv_codec import Codes, KVCodec
from .full_precision import FullPrecisionTokens
from .laying_out import code_range, laid_out, laid_out_by_operations
from .passes import StepPlan


class View(NamedTuple):
    """One layer's keys and values as the queries of one forward pass find them.

    Attributes:
        backend: what runs the attention.
        full_tokens: the sinks, then the positions ``full_start``, ..., ``end`` - 1.
        key_codes, value_codes: of the positions ``first_quantized``, ..., ``quantized`` - 1.
        plan: which positions these are, and who sees what of them.
        laid_out: keys and values (B, H, T, D), sinks, decoded and full-precision tokens, if they
            have been put side by side already.
    """

    codec: KVCodec
    backend: Backend
    full_tokens: FullPrecisionTokens
    key_codes: Codes
    value_codes: Codes
    plan: StepPlan
    laid_out: tuple[mx.array, mx.array] | None = None

    @property
    def queries(self) -> int:
        """The number of queries."""
        return self.plan.queries

    @property
    def first_quantized(self) -> int:
        """The position of the first code."""
        return self.plan.first_quantized

    @property
    def quantized(self) -> int:
        """One more than the position of the last code."""
        return self.plan.quantized

    @property
    def apart(self) -> "View":
        """The same, to be read without joining full-precision tokens that a kernel is to join."""
        return self._replace(full_tokens=self.full_tokens.apart())

    @property
    def whole(self) -> "View":
        """The same, but all queries see as far back as the first."""
        return self if self.plan.ring is None else self._replace(plan=self.plan.whole)

    def full(self, first: int, last: int) -> tuple[mx.array, mx.array]:
        """Full-precision keys and values of the sinks and of the positions first, ..., last - 1."""
        if first == self.plan.full_start and last == self.plan.end:
            return self.full_tokens.keys, self.full_tokens.values
        sinks, skip = self.plan.sinks, self.plan.sinks - self.plan.full_start
        keys, values = (
            mx.concatenate([x[:, :, :sinks], x[:, :, first + skip : last + skip]], axis=2)
            for x in (self.full_tokens.keys, self.full_tokens.values)
        )
        return keys, values

    def codes(self, first: int, last: int) -> tuple[Codes, Codes]:
        """Codes of keys and values of the positions first, ..., last - 1."""
        if (first, last) == (self.plan.first_quantized, self.plan.quantized):
            return self.key_codes, self.value_codes
        first, last = first - self.plan.first_quantized, last - self.plan.first_quantized
        return code_range(self.key_codes, self.value_codes, first, last)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All that the queries see, (B, H, T, D) in the model's dtype, codes dequantized."""
        places = self._places()
        if not places.decoded:
            return self.full(self.plan.end - places.full, self.plan.end)
        return laid_out(self, places) if support.on_gpu() else laid_out_by_operations(self, places)

    def _places(self) -> Places:
        """Of all tokens that the queries see; counted once for all layers."""
        plan = self.plan
        known = plan.shared.get("places")
        if known is None:
            oldest = plan.oldest(0)[1]
            quantized = max(oldest, min(plan.quantized, plan.full_from(plan.end - 1)))
            known = plan.shared["places"] = Places(
                left=0,
                sinks=plan.sinks,
                first_code=oldest - plan.first_quantized,
                decoded=quantized - oldest,
                first_full=plan.slot(quantized),
                full=plan.end - quantized,
                total=plan.sinks + plan.end - oldest,
            )
        return known
