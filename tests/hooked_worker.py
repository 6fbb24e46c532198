"""Write logits with compression to a file; for one process with patches/ and one without.

    TURBOQUANT=1 python tests/hooked_worker.py MODEL... OUT

Arguments: names of tiny models and an .npz file. Prints as JSON where mlx_lm came from, what
is replaced in it, and the classes of the caches.
"""

import json
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm
import tiny
from mlx_lm.generate import (
    _extend_cache,
    _merge_caches,
    generate_step,
    speculative_generate_step,
)
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache

import mlx_turboquant_plugin

LENGTHS = (300, 330)
NEW = 8


def logits_of(model, tokens):
    """The logits of every way to run a model, by name."""
    single, caches = tiny.logits(model, mx.array(tokens)[None])
    found = {"single": single}
    rows = [tiny.logits(model, mx.array(tokens[-n:])[None])[1] for n in LENGTHS]
    steps = mx.array([tokens[:NEW], tokens[NEW : 2 * NEW]])
    found["batch"], batch = tiny.logits(model, steps, _merge_caches(rows), chunk=1)
    found["chunk of a batch"], batch = tiny.logits(model, steps, batch, chunk=3)
    plain = [tiny.logits(model, mx.array(tokens)[None], _plain(model))[1] for _ in range(2)]
    joined = _extend_cache(_merge_caches(plain[:1]), _merge_caches([plain[1], rows[0]]))
    found["joined"], _ = tiny.logits(model, mx.array([tokens[:NEW]] * 3), joined, chunk=3)
    ring, rings = tiny.logits(model, mx.array(tokens)[None], _rings(model))
    found["ring"] = ring
    generated, handed = [], _saved_and_loaded(model, caches)
    for _, logprobs in generate_step(
        mx.array(tokens[:3]), model, max_tokens=NEW, prompt_cache=handed
    ):
        generated.append(logprobs)
    found["handed in"] = mx.stack(generated)
    drafts = _saved_and_loaded(model, caches) + _saved_and_loaded(model, caches)
    steps = speculative_generate_step(
        mx.array(tokens[:3]), model, model, max_tokens=NEW, prompt_cache=drafts
    )
    found["drafted"] = mx.stack([logprobs for _, logprobs, _ in steps])
    kinds = {type(one).__name__ for one in [*caches, *batch, *rings]}
    return found, kinds


def _plain(model):
    return [KVCache() for _ in model.layers]


def _rings(model):
    # Llama makes its own caches, whatever the size.
    return make_prompt_cache(model, max_kv_size=256)


def _saved_and_loaded(model, caches):
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "cache.safetensors")
        save_prompt_cache(path, caches)
        return load_prompt_cache(path)


def main():
    *names, out = sys.argv[1:]
    arrays, kinds = {}, set()
    for name in names:
        model, tokenizer = tiny.load(name)
        found, used = logits_of(model, tiny.text_tokens(tokenizer, 420))
        arrays |= {f"{name}, {way}": value for way, value in found.items()}
        kinds |= used
    mx.savez(out, **arrays)
    status = mlx_turboquant_plugin.status()
    print(
        json.dumps(
            {
                "mlx_lm": str(Path(mlx_lm.__file__).parent),
                "patched": status.patched,
                "models": status.models,
                "caches": sorted(kinds),
            }
        )
    )


if __name__ == "__main__":
    main()
