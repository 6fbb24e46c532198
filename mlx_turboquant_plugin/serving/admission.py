"""Who may run: a request waits until its caches fit beside those that run, in bytes."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..cache.sizes import Row
from ..log import logger
from .counts import Counts
from .prompt_store import PromptStore
from .sizes import Footprint

if TYPE_CHECKING:
    from .generator import BudgetedGenerator

# Of a prompt cache that has to go, writing begins so many tokens before.
AHEAD = 128


class TooLarge(ValueError):
    """A request that can never fit into the memory budget."""


class Admission:
    """The requests of one server, and the bytes that there are for them.

    The caches of running requests and those that are kept never take more than the budget. A
    running request has room for all of its tokens, prompt and ``max_tokens``, beside the others
    that run; what is kept gives way as it is used.

    Args:
        server: mlx-lm's ResponseGenerator.
        store: its prompt cache.
        limit: the budget in bytes.
        setting: the same as it was written, for messages.
        counts: where refused requests are counted.

    Attributes:
        generator: what generates now, if requests are batched.
    """

    def __init__(self, server: Any, store: PromptStore, limit: int, setting: str, counts: Counts):
        self.limit, self._setting = limit, setting
        self._server, self._store, self._counts = server, store, counts
        self._waiting: deque[Any] = deque()
        # Of the request that was looked at last: it is tokenized once.
        self._tokenized: tuple[Any, Any] = None, None
        self._footprint: tuple[Any, Footprint | None] = None, None
        self._model: Any = None
        self.generator: BudgetedGenerator | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait for room."""
        return len(self._waiting)

    def next_request(self, take: Callable[[float | None], Any], timeout: float | None) -> Any:
        """The next request that may run, or None if there is none.

        Args:
            take: mlx-lm's own ``_next_request``, which waits up to ``timeout`` seconds.
        """
        found = take(None if self._waiting else timeout)
        if found is not None:
            self._waiting.append(found)
        may_run = bool(self._waiting) and self._may_run(self._waiting[0])
        return self._waiting.popleft() if may_run else None

    def tokenize(
        self, tokenize: Callable[..., Any], tokenizer: Any, request: Any, args: Any
    ) -> Any:
        """What mlx-lm's own ``_tokenize`` returns, once there is room for the request.

        Raises:
            TooLarge: there never will be.
        """
        known, tokenized = self._tokenized
        self._tokenized = None, None
        if known is not request:
            tokenized = tokenize(tokenizer, request, args)
        row = self._row(tokenized[0], args)
        self._check(row)
        self._set_aside(tokenized[0], row)
        if self.generator is None:
            # It is served alone, and by nothing that could make room meanwhile.
            self._store.settle(self.limit - self.footprint.batch([row]))
        else:
            self._model = args.model
            self._store.settle(self._room(1, row))
        return tokenized

    def before_step(self) -> None:
        """Have those that run find room for one more token each."""
        self._store.make_room(self._room(AHEAD))
        self._store.settle(self._room(1))

    def has_room(self, copies: list[Row]) -> bool:
        """Whether there is room for copies of such caches beside those that run."""
        return self._store.settle(self._room(1) - sum(map(self.footprint.row, copies)))

    @property
    def footprint(self) -> Footprint:
        """That of the model that is loaded."""
        provider = self._server.model_provider
        key, known = self._footprint
        if known is None or key != provider.model_key:
            known = self._measured(provider)
            self._footprint = provider.model_key, known
        return known

    def _measured(self, provider: Any) -> Footprint:
        models = [model for model in (provider.model, provider.draft_model) if model]
        try:
            found = Footprint(models, provider.cli_args.prefill_step_size)
        except Exception as error:  # Models can be changed in any way, and have to run.
            logger.error(
                "the memory budget is not applied, since the caches of this model can't be "
                "measured: %s: %s",
                type(error).__name__,
                error,
            )
            return Footprint([], 0)
        logger.info(
            "memory budget %s: %d bytes, a request of 8192 tokens takes %d",
            self._setting,
            self.limit,
            found.row(Row(1, 8192)),
        )
        return found

    def _may_run(self, waiting: Any) -> bool:
        _, request, args = waiting
        if self.generator is None or args.model != self._model:
            # The server lets all others finish first, or nothing runs.
            return True
        if self._tokenized[0] is not request:
            try:
                # mlx-lm's own, not what leads to tokenize() above.
                tokenize = self._server._tokenize.__wrapped__
                tokenized = tokenize(self._server.model_provider.tokenizer, request, args)
            except Exception:
                # The server will find out itself, and tell the client.
                return True
            self._tokenized = request, tokenized
        row = self._row(self._tokenized[1][0], args)
        if self.footprint.batch([row]) > self.limit:
            # It will be refused.
            return True
        if self.footprint.batch([*self.generator.rows, row]) > self.limit:
            return False
        self._set_aside(self._tokenized[1][0], row)
        # Others run meanwhile, if some do: what goes to disk is in memory until it is written.
        return self._store.make_room(self._room(AHEAD, row)) or not self.generator.rows

    def _set_aside(self, prompt: list[int], row: Row) -> None:
        now = Row(row.prompt, row.prompt)
        key = self._server.model_provider.model_key
        self._store.set_aside(key, prompt, self.footprint.row(now))

    def _room(self, ahead: int, *new: Row) -> int:
        """The bytes that those that run, and ``new`` ones, leave when each has ``ahead`` more."""
        rows = [] if self.generator is None else self.generator.rows_in(ahead)
        rows += [Row(prompt, min(prompt + ahead, most)) for prompt, most in new]
        return self.limit - self.footprint.batch(rows)

    def _row(self, prompt: list[int], args: Any) -> Row:
        drafted = args.num_draft_tokens if self._server.model_provider.draft_model else 0
        return Row(len(prompt), len(prompt) + args.max_tokens + drafted)

    def _check(self, row: Row) -> None:
        needed = self.footprint.batch([row])
        if needed <= self.limit:
            return
        self._counts.refused += 1
        raise TooLarge(
            f"the KV cache of this request takes up to {needed} bytes ({row.prompt} tokens of "
            f"prompt and {row.most - row.prompt} of max_tokens), more than the server's "
            f"TURBOQUANT_MEMORY_BUDGET of {self.limit} ({self._setting}): send fewer tokens or a "
            f"smaller max_tokens, {self._most_tokens()} together, or raise the budget"
        )

    def _most_tokens(self) -> int:
        """How many tokens a request may have."""
        low, high = 0, 1
        while self.footprint.row(Row(high, high)) <= self.limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.footprint.row(Row(middle, middle)) <= self.limit
            low, high = (middle, high) if fits else (low, middle)
        return low
