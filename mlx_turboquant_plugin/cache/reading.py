"""How attention reads a cache: a view of it, or keys and values as KVCache returns them."""

import io
import weakref
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import _BaseCache

from ..log import log_once

Pair = tuple[mx.array, mx.array]

# In passes of one token and in passes of more, which may be computed in different ways; None
# where nobody knows yet.
Known = list[bool | None]


class Reading:
    """What is known of how an attention module reads its caches, which all share it.

    Args:
        model: the type of its model, as in the setting ``opt_out``.
        casts_keys: whether it casts the keys that it gets; they are the same keys.
        by_view: whether it reads views and nothing else.
        alone: whether attentions of its class that read views read nothing else; they share it.
        expected: whether somebody is known to read arrays, so that there is nothing to be said.
        followed: whether other layers read the cache after it, see :meth:`AttendedCache.follow`;
            None until the first pass has gone through the model.
    """

    __slots__ = ("alone", "by_view", "casts_keys", "expected", "followed", "model")

    def __init__(
        self,
        model: str,
        casts_keys: bool = False,
        by_view: bool | None = None,
        alone: Known | None = None,
        expected: bool = False,
        followed: bool | None = False,
    ):
        self.model, self.casts_keys = model, casts_keys
        self.expected, self.followed = expected, followed
        self.by_view: Known = [by_view, by_view]
        self.alone: Known = [None, None] if alone is None else alone


_alone: "weakref.WeakKeyDictionary[type, Known]" = weakref.WeakKeyDictionary()


def reading_of(
    attention: Any, model: str, casts_keys: bool, arrays: bool, followed: bool
) -> Reading:
    """The reading of an attention module that has not read anything yet; see :class:`Reading`.

    Args:
        arrays: whether it or another one computes with the arrays that it is given.
        followed: whether attentions of its class may be.
    """
    known = _alone.setdefault(type(attention), [None, None])
    by_view = False if arrays else None
    return Reading(model, casts_keys, by_view, known, arrays, None if followed else False)


class AttendedCache(_BaseCache):
    """A cache that leaves a view for mlx-lm's ``scaled_dot_product_attention`` to read.

    An attention that computes scores itself needs all keys and values. Whether it does shows in
    its first pass: it gets them, and they cost nothing if it reads the view alone. One that has
    read a view alone gets back what it gave from then on, and has to go on like this.

    Attributes:
        hooked: whether mlx-lm itself hands this cache to its attention (see patches/): then
            all keys and values are returned always, and a view is held until it is read.
        attending: whether a patched attention is running.
        reading: of that attention; by default it reads views.
        view: what the queries of the newest tokens see, or None.
        fetched: the keys and values that were returned with it.
        passed: what the queries of the newest pass saw, while layers may follow.
        whole: whether these are all, not those that were given.
        read: whether the view was read in their place; None if nothing was.
        interrupted: whether its model can't go on, see integration/whole_passes.py.
    """

    hooked = False
    attending = False
    # Of whoever sets ``attending``.
    reading = Reading("MODEL_TYPE", by_view=True)
    view: Any = None
    fetched: Pair | None = None
    passed: Any = None
    whole = True
    read: bool | None = None
    interrupted = False

    def __getattr__(self, name: str) -> Any:
        # Of what mlx-lm's caches have, this is about the room in their arrays.
        row = "extract(i) gives a row's cache, and " if hasattr(type(self), "extract") else ""
        raise AttributeError(
            f"a {type(self).__name__} has no {name}, since it keeps codes; {row}its to_exact() "
            "gives mlx-lm's own with the same tokens",
            name=name,
            obj=self,
        )

    def leave(self, view: Any, keys: mx.array, values: mx.array) -> Pair:
        """Leave ``view`` for the queries that come with ``keys`` and ``values``.

        Returns:
            Both as given if their attention is known to read the view, else all of both.

        Raises:
            RuntimeError: see :meth:`settle`.
        """
        if self.view is not None:
            self.settle()
        self.whole = self.hooked or not self.reading.by_view[keys.shape[2] > 1]
        self.fetched = self.fetch(view) if self.whole else (keys, values)
        self.view, self.read = view, None
        return self.fetched

    def end(self) -> None:
        """The attention of the newest tokens has ended."""
        if self.reading.followed is not False:
            self.passed = self.view
        self.attending, self.view, self.fetched = False, None, None

    def follow(self) -> None:
        """The attention of a layer begins that sees what that of the newest tokens has seen."""
        self.reading.followed = True
        if self.passed is not None:
            self.attending, self.view, self.whole = True, self.passed, True
            self.fetched = self.fetch(self.view)

    def end_pass(self) -> None:
        """The newest tokens have passed all layers of the model."""
        if self.passed is not None:
            self.reading.followed = bool(self.reading.followed)
            self.passed = None

    def take(self, keys: mx.array, values: mx.array) -> Any:
        """The view that stands for ``keys`` and ``values``, or None if these are to be read."""
        view = self.view
        if view is None:
            return None
        same_keys = keys is self.fetched[0] or self.reading.casts_keys
        if not same_keys or values is not self.fetched[1]:
            # Something else was made of what was returned.
            self.read = False
            return None
        if self.hooked:
            # Nobody says when the attention has ended.
            self.view = self.fetched = None
        elif self.read is None:
            self.read = True
        return view

    def settle(self, outputs: Any = None) -> None:
        """The attention of the newest tokens has ended: learn how it reads.

        Args:
            outputs: what it returned, arrays in a tree; looked at in the first pass of its class.

        Raises:
            RuntimeError: it got back what it gave, and did not read the view.
        """
        if self.view is None or self.reading.expected:
            return
        by_view, alone = self.reading.by_view, self.reading.alone
        several = self.view.queries > 1
        if self.read and alone[several] is None:
            if outputs is None:
                # It updates the cache once more: what it returns will tell.
                return
            alone[several] = not _made_of(self.fetched, outputs)
        if by_view[several] is None:
            by_view[several] = bool(self.read and alone[several])
        if self.read and (by_view[several] or self.hooked):
            return
        model = self.reading.model
        if not self.whole:
            raise RuntimeError(
                f"the attention of {model} has read its compressed cache through mlx-lm's "
                "scaled_dot_product_attention so far, and now does without: it would see no "
                f"earlier token. Leave the model out with TURBOQUANT_OPT_OUT={model}"
            )
        log_once(
            "%s: its attention does not leave its keys to mlx-lm's scaled_dot_product_attention "
            "alone, and gets all keys and values dequantized: right, but slow, and in KVCache's "
            "memory; TURBOQUANT_OPT_OUT=%s leaves the model out",
            model,
            model,
        )

    def check_whole(self) -> None:
        """Raise RuntimeError if a pass over this and the other layers' caches was interrupted."""
        if self.interrupted:
            raise RuntimeError(
                "a pass over this prompt cache was interrupted, and not all of its layers can go "
                "back to where it began: make the prompt cache again"
            )

    def fetch(self, view: Any) -> Pair:
        """All keys and values that the queries of ``view`` see."""
        if self.reading.by_view[view.queries > 1] is not False:
            # Nobody pays for these but who evaluates them, and perhaps nobody does.
            view = view.apart
        return tuple(mx.depends(view.keys_and_values(), self.arrays))


def _made_of(arrays: Pair, outputs: Any) -> bool:
    """Whether ``outputs``, not evaluated yet, were computed of ``arrays``.

    Their graph goes back to the model's first layer, so that of a later one is long.
    """
    leaves: Any = tree_flatten(outputs)
    graph = io.StringIO()
    mx.export_to_dot(
        graph, *(x for _, x in leaves if isinstance(x, mx.array)), keys=arrays[0], values=arrays[1]
    )
    return any(f'"{name}" ->' in graph.getvalue() for name in ("keys", "values"))
