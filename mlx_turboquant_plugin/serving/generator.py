"""mlx-lm's BatchGenerator, which tells how many tokens its sequences have and will have."""

from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import BatchGenerator

from ..cache.sizes import Row
from .admission import Admission
from .prompt_store import moved_from


@dataclass
class _Running:
    """A sequence: the tokens of its prompt, those that its cache has by now, and may have."""

    prompt: int
    length: int
    most: int


class BudgetedGenerator(BatchGenerator):
    """Generates for the requests that ``admission`` has let in; arguments as for its base."""

    def __init__(self, admission: Admission, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._running: dict[int, _Running] = {}
        self._admission = admission
        admission.generator = self
        # A sequence that has ended leaves the batch right after: there need not be two of it.
        batch = self._generation_batch
        batch.extract_cache = lambda index: moved_from(batch.prompt_cache, index)

    @property
    def rows(self) -> list[Row]:
        """What the sequences will have in the end."""
        return [Row(one.prompt, one.most) for one in self._running.values()]

    def rows_in(self, ahead: int) -> list[Row]:
        """What they have ``ahead`` tokens from now, those of their prompts anyway."""
        return [
            Row(one.prompt, min(one.length + ahead, one.most)) for one in self._running.values()
        ]

    def insert_segments(
        self, segments, max_tokens=None, caches=None, all_tokens=None, *args, **kwargs
    ):
        uids = super().insert_segments(segments, max_tokens, caches, all_tokens, *args, **kwargs)
        for index, (uid, parts) in enumerate(zip(uids, segments)):
            known = all_tokens[index] if all_tokens else []
            more = max_tokens[index] if max_tokens else self.max_tokens
            prompt = len(known) + sum(map(len, parts))
            self._running[uid] = _Running(prompt, prompt, prompt + more)
        return uids

    def next(self):
        self._admission.before_step()
        prompts, generated = super().next()
        for response in generated:
            if response.finish_reason is None:
                self._running[response.uid].length += 1
            else:
                del self._running[response.uid]
        return prompts, generated

    def remove(self, uids, *args, **kwargs):
        for uid in uids:
            self._running.pop(uid, None)
        return super().remove(uids, *args, **kwargs)

    def extract_cache(self, uids):
        """Copies of the caches of ``uids``; empty ones for those that there is no room for."""
        found: dict[int, Any] = {}
        copies: list[Row] = []
        for uid in uids:
            prompt = self._running[uid].prompt
            copies.append(Row(prompt, prompt))
            if self._admission.has_room(copies):
                found.update(super().extract_cache([uid]))
            else:
                copies.pop()
                found[uid] = [], []
        return found

    def close(self):
        if self._admission.generator is self:
            self._admission.generator = None
        super().close()
