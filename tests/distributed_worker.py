"""Generate on one of several ranks and print what it took as a line of JSON.

    mlx.launch -n 2 -- python tests/distributed_worker.py tensor MODEL

Arguments: "tensor" (each rank has a part of every layer) or "pipeline" (each rank has some of
the layers), and the model's folder.
"""

import json
import sys

import mlx.core as mx
import tiny
from mlx_lm.generate import batch_generate, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import sharded_load

LENGTH = 300
NEW = 6


def generate(model, tokenizer):
    """What greedy generation gives, alone and in a batch, and what its cache takes."""
    text = tiny.text_tokens(tokenizer, LENGTH)
    cache = make_prompt_cache(model)
    mx.reset_peak_memory()
    responses = stream_generate(
        model, tokenizer, text, max_tokens=NEW, prompt_cache=cache, prefill_step_size=128
    )
    generated = [(one.token, one.logprobs[one.token].item()) for one in responses]
    peak = mx.get_peak_memory()
    # The shorter one is padded.
    batch = batch_generate(
        model, tokenizer, [text[40:], text], max_tokens=NEW, return_token_ids=True
    )
    return {
        "caches": [type(one).__name__ for one in cache],
        "heads": cache[0].keys.shape[1],
        "kv_bytes": sum(one.nbytes for one in cache),
        "peak_bytes": peak,
        "tokens": [token for token, _ in generated],
        "logprobs": [logprob for _, logprob in generated],
        "batch": batch.token_ids,
    }


def main():
    kind, path = sys.argv[1:]
    group = mx.distributed.init(backend="ring", strict=True)
    model, tokenizer = sharded_load(
        path, *{"pipeline": (group, None), "tensor": (None, group)}[kind]
    )
    # Sums that are split between ranks round otherwise: little in fp32.
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    report = {"rank": group.rank(), "ranks": group.size(), **generate(model, tokenizer)}
    # A rank that is done must not leave before the others are.
    mx.synchronize()
    mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group, stream=mx.cpu))
    # The ranks write into one pipe: a line at a time, in one piece.
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
