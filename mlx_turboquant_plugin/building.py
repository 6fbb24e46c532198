"""``python -m mlx_turboquant_plugin.building JOB``: what :mod:`compiling` runs beside a model.

A job is a :class:`CodecSpec` as JSON. A small attention layer with that codec does what
layers of models do, which leaves MLX's folder full of the libraries that they need.
"""

import json
import os
import sys
from typing import Any

from .codecs.kv_codec import CodecSpec
from .compiling import finished
from .tools.cases import Case
from .tools.checked_layer import CheckedLayer

# Prompts, then decoding over several pieces of codes.
WORK: tuple[dict[str, Any], ...] = (
    {"count": 64, "lengths": (1600,)},
    {"lengths": (9000,), "steps": 33},
)


def build(job: str) -> None:
    """Compile what a codec needs, and leave word that it is done."""
    spec = CodecSpec(*json.loads(job))
    for work in WORK:
        for extras in (False, True):
            case = Case(
                spec.head_dim,
                spec.value_dim,
                groups=2,
                keys=(spec.key_codec, spec.key_bits),
                values=(spec.value_codec, spec.value_bits),
                dtype="bfloat16",
                extras=extras,
                **work,
            )
            CheckedLayer(case, "compiled").attend()
    finished(job).touch()


if __name__ == "__main__":
    # The model that is running comes first.
    os.nice(10)
    build(sys.argv[1])
