"""The compressed KV cache of one sequence."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, create_attention_mask

from ..backends import Backend, backend
from ..codecs.key_bias import KeyBias
from ..codecs.kv_codec import CodecSpec, Codes, KVCodec
from ..log import log_once
from ..per_thread import release
from . import state as saved
from .adoption import check_placed, codec_of
from .causal import made
from .copies import shared, unpickled
from .encoding import encode, encode_pass, fuses
from .full_precision import FullPrecisionTokens
from .passes import StepPlan, plan_step, plan_view
from .reading import AttendedCache
from .shapes import check_shapes
from .transaction import AllOrNothing
from .trimming import checked_offset, rewind, whole_number
from .view import View
from .visibility import Ring, Visibility


class CompressedKVCache(AttendedCache):
    """Stands where mlx-lm's KVCache would, in about a quarter of the memory.

    The first tokens (the sinks) and the newest are in full precision, and all but the newest are
    there as codes; which of the two a query reads is for :class:`Visibility`. Arrays are
    replaced, never written into, and hold no spare room: a copy shares them, ``nbytes``
    is what they take, and a step of decoding touches only the newest tokens.

    Args:
        codec: how to encode; by default made from the first keys with the default
            bits and no knowledge of the model.
        visibility: the window and the sinks.
        kernel: the name of the backend.

    Attributes:
        backend: what makes the codes and runs the attention.
        full_tokens: the sinks and the newest tokens as they are.
        keys, values: these, (B, H, E, D) in the model's dtype; to an attention that is running,
            those of all tokens, the codes dequantized.
        unplaced_bias: that of a file, until it is known how the model's keys turn.
        fingerprint: as a string it tells the layer that fills the cache from others; empty
            where nobody knows.
        key_codes, value_codes: the codes of the positions first_quantized, ..., quantized - 1,
            see :class:`KVCodec`.
        offset: the number of tokens seen; setting it to less trims.
    """

    ring: Ring | None = None
    # Set by the module of the batch, which imports this one.
    batch_type: Any

    def __init__(
        self,
        codec: KVCodec | None = None,
        visibility: Visibility = Visibility(),
        kernel: str = "eager",
    ):
        self.codec = codec
        self.visibility = visibility
        self.backend: Backend = backend(kernel)
        self.unplaced_bias: mx.array | None = None
        self.fingerprint: Any = ""
        self.attention: Callable[[], Any] | None = None
        self.hold(FullPrecisionTokens())

    def hold(
        self,
        full_tokens: FullPrecisionTokens,
        key_codes: Codes = (),
        value_codes: Codes = (),
        first_quantized: int = 0,
        quantized: int = 0,
        offset: int = 0,
    ) -> None:
        """Replace the content by this; see the attributes."""
        self.full_tokens = full_tokens
        self.key_codes, self.value_codes = key_codes, value_codes
        self.first_quantized, self.quantized = first_quantized, quantized
        self._offset = offset

    @property
    def kernel(self) -> str:
        """The name of the backend."""
        return self.backend.name

    @property
    def offset(self) -> int:
        return self._offset

    @offset.setter
    def offset(self, v: int):
        # Programs that know KVCache go back like that.
        self.trim(self._offset - checked_offset(self, v))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values and return all that the cache holds.

        Args:
            keys, values: (B, H, N, D), at the positions offset, ..., offset + N - 1.

        Returns:
            Keys and values (B, H, T, D), the codes dequantized. Inside a patched
            attention, if that reads the codes instead, ``keys`` and ``values`` as given.

        Raises:
            ValueError: see :meth:`append`.
            RuntimeError: see :meth:`settle`.
        """
        if self.attending:
            # Which is made whole or not at all itself.
            return self.leave(self._append(keys, values), keys, values)
        view = self.append(keys, values)
        return self.leave(view, keys, values) if self.hooked else self.fetch(view)

    def fetch(self, view: View) -> tuple[mx.array, mx.array]:
        if self.quantized:
            check_placed(self)
        return super().fetch(view)

    def append(self, keys: mx.array, values: mx.array, is_prompt: bool | None = None) -> View:
        """Append keys and values (B, H, N, D); returns what their queries see.

        Args:
            is_prompt: see :class:`View`; by default what N says.

        Raises:
            ValueError: keys and values are not of one length, or have other head dims than
                the codec. After any exception the cache is as before.
        """
        with AllOrNothing(self):
            return self._append(keys, values, is_prompt)

    def _append(self, keys: mx.array, values: mx.array, is_prompt: bool | None = None) -> View:
        start, shape, full = self._offset, keys.shape, self.full_tokens
        if self.codec is None:
            self.codec = KVCodec(CodecSpec(shape[-1], values.shape[-1]))
        check_shapes(shape, values.shape, self.codec.spec, full.heads)
        step = plan_step(
            self.visibility,
            self.ring,
            self.backend.fixed_shapes,
            self.first_quantized,
            self.quantized,
            full.count,
            start,
            start + shape[2],
            is_prompt,
        )
        plan = step.plan
        self.full_tokens = full.grown(keys, values, step.sinks, step.drop)
        self._offset = plan.end
        if plan.is_prompt and self.ring is None and fuses(self, keys, values):
            view = encode_pass(self, start, keys, values)
            if view is not None:
                return view
        encode(self, step.encode_to)
        view = self._view(plan)
        self._forget(step.is_step)
        return view

    def emptied(self) -> "CompressedKVCache":
        """An empty cache of the same layer."""
        other = shared(self)
        other.hold(FullPrecisionTokens())
        return other

    def _forget(self, is_step: bool) -> None:
        """Drop what no later query will read exactly; a step has done so before."""
        if not is_step:
            retained = self.visibility.retained_from(self.offset, self.backend.fixed_shapes)
            self._drop_full(min(retained, self.quantized) - self.full_start)

    def _drop_full(self, drop: int) -> None:
        if drop > 0:
            self.full_tokens = self.full_tokens.without(self.sinks, drop)

    @property
    def sinks(self) -> int:
        """How many of the full-precision tokens are sinks."""
        return min(self.visibility.sinks, self.offset)

    @property
    def full_start(self) -> int:
        """Position of the first full-precision token after the sinks."""
        return self.offset - (self.full_tokens.count - self.sinks)

    @property
    def bias(self) -> mx.array | None:
        """The key bias (H, D) that the codes leave out, or None."""
        if self.unplaced_bias is not None:
            return self.unplaced_bias
        known = self.codec and self.codec.bias
        return known.bias if known else None

    @property
    def informed(self) -> bool:
        """Whether it knows anything of its layer by now."""
        return self.unplaced_bias is not None or (self.codec is not None and self.codec.informed)

    @property
    def keys(self) -> mx.array | None:
        return self._shown()[0]

    @keys.setter
    def keys(self, v: mx.array):
        if self.attending and self.fetched is not None and v.shape == self.fetched[0].shape:
            # What was shown of all tokens, with more that it depends on.
            v = mx.depends(self.full_tokens.keys, v)
        self.full_tokens = self.full_tokens.replaced(v, self.full_tokens.values)

    @property
    def values(self) -> mx.array | None:
        return self._shown()[1]

    @values.setter
    def values(self, v: mx.array):
        self.full_tokens = self.full_tokens.replaced(self.full_tokens.keys, v)

    def _shown(self) -> tuple[mx.array | None, mx.array | None]:
        """What others find in :attr:`keys` and :attr:`values`."""
        if self.attending and not self.empty():
            return self.keys_and_values()
        return self.full_tokens.keys, self.full_tokens.values

    def _view(self, plan: StepPlan) -> View:
        return View(
            self.codec, self.backend, self.full_tokens, self.key_codes, self.value_codes, plan
        )

    def view_from(self, start: int, is_prompt: bool = False) -> View:
        """What the queries from position ``start`` on see."""
        plan = plan_view(
            self.visibility,
            self.ring,
            self.first_quantized,
            self.quantized,
            self.full_tokens.count,
            start,
            self._offset,
            is_prompt,
        )
        return self._view(plan)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All keys and values, (B, H, T, D) in the model's dtype, codes dequantized."""
        if self.attending and self.whole and self.fetched is not None:
            return self.fetched
        if self.quantized:
            check_placed(self)
        view = self.view if self.attending else None
        return (view or self.newest_view()).keys_and_values()

    def newest_view(self) -> View:
        """What the newest token sees."""
        return self.view_from(self._offset - 1)

    def bind(
        self,
        codec: KVCodec,
        fingerprint: Any,
        kernel: str,
        invariant: bool,
        place: Callable[[mx.array], KeyBias],
    ) -> None:
        """Adopt what is known about the attention module that uses this cache.

        Args:
            codec, place: see :func:`~.adoption.codec_of`.
            fingerprint: what :attr:`fingerprint` becomes; read only if the cache is filled.
            kernel: the name of the backend.
            invariant: see :class:`Visibility`; for a cache that has none, as from a file.

        Raises:
            ValueError: the cache was filled by another model.
        """
        self.codec = codec_of(self, codec, fingerprint, place)
        self.unplaced_bias = None
        self.fingerprint = fingerprint
        self.backend = backend(kernel)
        if self.visibility.invariant is None:
            self.visibility = self.visibility._replace(invariant=invariant)

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens (at most all of them) and return how many.

        Up to 16 tokens leave no trace; a longer trim leaves up to a window of the
        newest remaining tokens only as codes.

        Raises:
            ValueError: it is not trimmable and ``n`` is not 0; nothing is forgotten then.
        """
        n = max(0, min(self.offset, whole_number(n)))
        with AllOrNothing(self):
            rewind(self, self.offset - n)
            self.passed = None
            release(self.arrays)
        return n

    def is_trimmable(self) -> bool:
        return True

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        # Without sinks, a long trim can leave codes alone.
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        """Every byte of this cache: full-precision tokens, codes, scales and zero points."""
        codes = (*self.key_codes, *self.value_codes)
        return self.full_tokens.nbytes + sum(array.nbytes for array in codes)

    @property
    def holders(self) -> tuple[Any, ...]:
        """The objects whose attributes make up this cache."""
        return (self,)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All arrays that it holds, full-precision tokens joined or not."""
        return *self.full_tokens.arrays, *self.key_codes, *self.value_codes

    @property
    def state(self):
        self.check_whole()
        return saved.to_state(self)

    @state.setter
    def state(self, v):
        saved.restore(self, v)

    def columns(self, count: int) -> int | None:
        """T of a mask (B, H, N, T) for the next ``count`` tokens.

        So many tokens mlx-lm's own cache would return; None if not in the order of time.
        """
        if self.ring is None:
            return self.offset + count
        return self.ring.columns(self.offset, count)

    def cuts(self, count: int) -> list[int]:
        """Which of the next ``count`` tokens read other ones exactly than those before them.

        Empty for rings, whose masks can't be cut.
        """
        if self.ring is not None or self.visibility.is_prompt(count):
            return []
        start = self.offset
        return [position - start for position in self.visibility.changes(start, start + count)]

    def make_mask(self, *args, **kwargs):
        return made(create_attention_mask(*args, offset=self.offset, **kwargs))  # type: ignore[misc]

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "CompressedKVCache":
        """Stay as it is: the cache is quantized already."""
        log_once(
            "kv_bits=%d is ignored: the KV cache is compressed by TurboQuant already; leave it "
            "out, since mlx_lm.server batches no requests with it, or unset TURBOQUANT to use "
            "mlx-lm's own quantization",
            bits,
        )
        return self

    def to_exact(self) -> KVCache:
        """mlx-lm's KVCache with the same tokens, the codes dequantized."""
        cache = KVCache()
        if not self.empty():
            cache.keys, cache.values = map(mx.contiguous, self.keys_and_values())
            cache.offset = self.offset
            release((cache.keys, cache.values))
        return cache

    @classmethod
    def merge(cls, caches: list[Any]):
        """The caches of several sequences as the cache of a batch; mlx-lm's KVCaches, too."""
        return cls.batch_type.merge(caches)

    __copy__ = shared

    def __deepcopy__(self, memo):
        return shared(self)

    def __reduce__(self):
        return unpickled, (type(self), self.state, self.visibility, self.kernel)
