"""What the default settings cost a real model."""

import mlx.core as mx
import pytest
import tiny

from mlx_turboquant_plugin.tools import smollm2, texts
from mlx_turboquant_plugin.tools.runs import (
    compressed,
    compressed_prompt_cache,
    prompt_cache,
)
from mlx_turboquant_plugin.tools.teacher_forcing import diverge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(smollm2.source() is None, reason=f"needs a model: {smollm2.INSTALL}"),
]


def test_the_logits_stay_close_over_2048_tokens():
    model, tokenizer = smollm2.load(smollm2.source())
    model.set_dtype(mx.float32)
    tiny.by_columns(model)
    tokens = mx.array(texts.read_text_file(None, tokenizer)[:2048])
    exact = prompt_cache(model)
    with compressed(preset="default", invariant=True):
        found = diverge(model, tokens, 128, exact, compressed_prompt_cache(model))
    print(f"mean KL {found.kl:.2e} nats, top-1 agreement {found.top1:.2%}")
    assert found.positions == 2048
    assert found.kl <= 1.5e-3
    assert found.top1 >= 0.98
