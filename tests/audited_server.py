"""mlx_lm.server, with every byte of its caches counted after each step: python FILE AUDIT ARGS."""

import gc
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, _BaseCache

from mlx_turboquant_plugin.cache.packed import PackedRows

AUDIT = Path(sys.argv.pop(1))
most = {"nbytes": 0, "steps": 0, "running": 0}


def held():
    """The bytes of all caches that are alive, each array once: by Python's own book-keeping."""
    found = {}
    for one in gc.get_objects():
        if not isinstance(one, (_BaseCache, PackedRows)):
            continue
        arrays = one.__dict__.get("arrays") or getattr(type(one), "arrays", None)
        if arrays is not None:
            for array in one.arrays:
                found[id(array)] = array.nbytes
        else:
            for array in one.__dict__.values():
                if isinstance(array, mx.array):
                    found[id(array)] = array.nbytes
    return sum(found.values())


def audited(kind, name):
    plain = getattr(kind, name)

    def call(self, *args, **kwargs):
        result = plain(self, *args, **kwargs)
        nbytes, running = held(), len(getattr(self, "_generation_batch", ()))
        most["steps"] += 1
        if nbytes > most["nbytes"] or running > most["running"]:
            most["nbytes"] = max(most["nbytes"], nbytes)
            most["running"] = max(most["running"], running)
            AUDIT.write_text(json.dumps(most))
        return result

    setattr(kind, name, call)


def every(kind):
    return [kind, *(deeper for one in kind.__subclasses__() for deeper in every(one))]


if __name__ == "__main__":
    # What is there by now is no cache: it need not be looked through each time.
    gc.freeze()
    audited(BatchGenerator, "next")
    audited(LRUPromptCache, "insert_cache")
    server.main()
