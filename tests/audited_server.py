"""mlx_lm.server, with every byte of its caches counted after each step: python FILE AUDIT ARGS.

AUDIT is a JSON file. With SLOW_DISK in the environment, a file of the disk cache takes a while.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, _BaseCache

from mlx_turboquant_plugin.cache.batched_rows import BatchedRows
from mlx_turboquant_plugin.serving import disk_files

AUDIT = Path(sys.argv.pop(1))
most = {"nbytes": 0, "steps": 0, "running": 0}


def held():
    """The bytes of all caches that are alive, each array once: by Python's own book-keeping."""
    found = {}
    for one in gc.get_objects():
        if not isinstance(one, (_BaseCache, BatchedRows)):
            continue
        arrays = one.arrays if hasattr(type(one), "arrays") else one.__dict__.values()
        found.update((id(x), x.nbytes) for x in arrays if isinstance(x, mx.array))
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


def slowed(function):
    def call(*args):
        time.sleep(0.3)
        return function(*args)

    return call


if __name__ == "__main__":
    if "SLOW_DISK" in os.environ:
        disk_files._checksum = slowed(disk_files._checksum)
    # What is there by now is no cache: it need not be looked through each time.
    gc.freeze()
    audited(BatchGenerator, "next")
    audited(LRUPromptCache, "insert_cache")
    server.main()
