"""What mlx-lm's programs make of tiny models: without quantization, as without the plugin.

A few stand for all; the others are slow.
"""

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models
from mlx.utils import tree_map_with_path, tree_unflatten
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.tuner.utils import linear_to_lora_layers
from test_models import compressed_parts, error

import mlx_turboquant_plugin

SETTINGS = dict(window=32, sinks=2)
STEP, COUNT = 64, 8
LENGTHS = 150, 97, 3
PROMPT = mx.random.randint(0, 64, (LENGTHS[0],), key=mx.random.key(5)).tolist()
PROMPTS = [PROMPT[-length:] for length in LENGTHS]


def quantized():
    model = tiny_models.build("qwen2")
    nn.quantize(model, group_size=32)
    return model


def adapted(base, dora=False):
    """A model with adapters of every linear layer that change what it says."""
    linear_to_lora_layers(base, 2, dict(rank=4, scale=2.0, dropout=0.0), use_dora=dora)
    mx.random.seed(3)
    base.update(
        tree_map_with_path(
            lambda path, x: 0.1 * mx.random.normal(x.shape) if path.endswith("lora_b") else x,
            base.parameters(),
        )
    )
    base.eval()
    return base


def fused(model):
    """As mlx_lm.fuse does."""
    linears = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    assert linears
    model.update_modules(tree_unflatten(linears))
    return model


def sharing():
    """Its last two layers have no keys of their own."""
    return tiny_models.build(
        "gemma4_text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=tiny_models.SLIDING * 2,
    )


MODELS = {
    **{
        name: lambda name=name: tiny_models.build(name)
        for name in (
            *("gemma3", "gpt_oss", "cohere2"),  # sliding windows
            *("qwen3_next", "qwen3_5", "jamba", "falcon_h1"),  # hybrids
            *("qwen3_moe", "mixtral", "hunyuan"),  # experts, shared keys
        )
    },
    "gemma4_text, shared": sharing,
    "quantized": quantized,
    "lora": lambda: adapted(tiny_models.build("qwen2")),
    "lora, fused": lambda: fused(adapted(tiny_models.build("qwen2"))),
    "lora, quantized": lambda: adapted(quantized()),
    "lora, quantized, fused": lambda: fused(adapted(quantized())),
    "dora": lambda: adapted(tiny_models.build("qwen2"), dora=True),
    "dora, fused": lambda: fused(adapted(tiny_models.build("qwen2"), dora=True)),
    "dora, quantized": lambda: adapted(quantized(), dora=True),
}
QUICK = {"gemma3", "qwen3_5", "qwen3_moe", "lora, quantized", "dora"}
UNCOMPRESSED = {"gemma4_text, shared"}


def generate(model):
    steps = generate_step(mx.array(PROMPT), model, max_tokens=COUNT, prefill_step_size=STEP)
    return [list(steps)]


def batch(model):
    """Prompts that join and leave while others are generated."""
    generator = BatchGenerator(model, max_tokens=COUNT, prefill_step_size=STEP)
    uids = generator.insert(PROMPTS[:2], [COUNT, 3])
    steps = {}
    while any(len(steps.get(uid, ())) < 2 for uid in uids):
        collect(generator, steps)
    uids += generator.insert(PROMPTS[2:])
    while collect(generator, steps):
        pass
    return [steps[uid] for uid in uids]


def collect(generator, steps, finished=lambda response: None):
    """Take one step; returns whether there was anything to do."""
    prompts, responses = generator.next()
    for response in responses:
        steps.setdefault(response.uid, []).append((response.token, response.logprobs))
        if response.finish_reason:
            finished(response)
    return bool(prompts or responses)


def server(model):
    """Conversations that go on, part anew and come twice, as the server's thread runs them."""
    known, out = LRUPromptCache(), []
    rounds = [PROMPTS, [[*p, 5, 6, 7] for p in PROMPTS], [PROMPT[:120] + [9, 8]] * 2]
    for prompts in rounds:
        generator, steps, uids = (
            BatchGenerator(model, max_tokens=COUNT, prefill_step_size=STEP),
            {},
            [],
        )
        for prompt in prompts:
            cache, rest = known.fetch_nearest_cache("model", prompt)
            done = prompt[: len(prompt) - len(rest)]
            uids += generator.insert_segments(
                [[rest[:-1], rest[-1:]]], caches=[cache], all_tokens=[done]
            )
        while collect(
            generator,
            steps,
            lambda r: known.insert_cache("model", r.all_tokens[:], r.prompt_cache),
        ):
            pass
        out += [steps[uid] for uid in uids]
    return out


def speculative(model):
    if not mlx_lm_cache.can_trim_prompt_cache(mlx_lm_cache.make_prompt_cache(model)):
        pytest.skip("mlx-lm has no speculative decoding of this model")
    draft = tiny_models.build("qwen2")
    # A ring can be trimmed until it is full.
    rings = any(hasattr(c, "max_size") for c in mlx_lm_cache.make_prompt_cache(model))
    prompt = mx.array(PROMPT[: tiny_models.WINDOW - 2 * COUNT if rings else None])
    steps = speculative_generate_step(
        prompt, model, draft, max_tokens=COUNT, num_draft_tokens=3, prefill_step_size=STEP
    )
    return [[(token, logprobs) for token, logprobs, _ in steps]]


@pytest.mark.parametrize("program", [generate, batch, server, speculative])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS]
)
def test_exact_vectors_give_what_mlx_lms_own_caches_give(name, program):
    model = MODELS[name]()
    expected = program(model)
    mlx_turboquant_plugin.enable(bypass="identity", **SETTINGS)
    made = program(model)
    assert bool(compressed_parts(mlx_lm_cache.make_prompt_cache(model))) != (name in UNCOMPRESSED)
    for ours, others in zip(made, expected, strict=True):
        tokens, logprobs = zip(*ours)
        expected_tokens, expected_logprobs = zip(*others)
        assert tokens == expected_tokens
        assert error(mx.stack(logprobs), mx.stack(expected_logprobs)) < 1e-4


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_codes_suit_the_adapted_model(dora):
    """Before and after its adapters are fused, which is the same model."""
    model = adapted(tiny_models.build("qwen2"), dora)
    tokens = mx.array([PROMPT])
    expected, losses = model(tokens), []
    for prepare in (lambda model: model, fused):
        model = prepare(model)
        mlx_turboquant_plugin.enable(invariant=True, **SETTINGS)
        made = model(tokens, cache=mlx_lm_cache.make_prompt_cache(model))
        mlx_turboquant_plugin.disable()
        losses.append(error(made, expected))
    # How much logits depend on codes is for random weights to say.
    assert 1e-4 < losses[0] < 0.3
    assert abs(losses[0] / losses[1] - 1) < 0.1
