"""Every architecture of mlx-lm: what is compressed works as the model alone does.

A few stand for all of them; the others take a minute or two: ``-m "slow or not slow"``.
"""

import pkgutil
import tomllib

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.models
import model_table
import numpy as np
import pytest
import tiny_models
from mlx_lm.generate import _merge_caches
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import RotatingKVCache
from processes import ROOT

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import BatchCompressedKVCache, CompressedKVCache
from mlx_turboquant_plugin.codecs.segmented import ERRORS, USUAL_BITS
from mlx_turboquant_plugin.integration import table, whole_passes

# One for each way in which a family differs from Llama.
QUICK = {
    "deepseek_v3",  # latents
    "falcon_h1",  # attention beside a state, in a CacheList
    "gemma2",  # arrays
    "gemma3",  # sliding windows, norms of heads, through the module of another model
    "gemma3n",  # layers that follow others
    "gpt_oss",  # learned sinks, sliding windows, biases
    "internlm2",  # a fused projection by KV head, with a bias
    "llama4",  # layers with caches that stay as they are
    "mimo_v2_flash",  # keys and values of different dims, heads by layer, learned sinks
    "longcat_flash",  # latents, two attentions in a layer
    "phi3",  # a fused projection
    "qwen2_moe",  # biases
    "qwen3_5",  # full attention in some layers, a state in the others
    "qwen3_moe",  # norms of heads
    # and of those that are not compressed:
    "mamba2",
}
# What needs a GPU, or another package, to run at all.
NOT_HERE = {"bitnet", "muse_spark", "olmo"}
SETTINGS = dict(window=32, sinks=2, preset="quality")
CHUNKS = (64, 37, 60, 1, 1)
# mlx-lm's own batches of these fail, or depend on the padding.
NO_BATCHES = {"afm7", "gemma2", "gpt_bigcode", "phi3small"}
TOKENS = mx.random.randint(0, 64, (1, sum(CHUNKS)), key=mx.random.key(7))


def each(names):
    """Parametrise by name; what does not stand for others is slow."""
    marks = {True: (), False: pytest.mark.slow}
    params = [pytest.param(name, marks=marks[name in QUICK], id=name) for name in names]
    return pytest.mark.parametrize("name", params)


def enable(**overrides):
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable(**SETTINGS, **overrides)


def run(model, tokens, chunks, caches=None):
    """(logits fp32 (B, N, vocabulary), caches), the tokens fed in ``chunks``."""
    caches = mlx_lm_cache.make_prompt_cache(model) if caches is None else caches
    parts, start = [], 0
    for count in chunks:
        out = model(tokens[:, start : start + count], cache=caches)
        parts.append(out[..., :64])
        mx.eval(parts[-1], [c.state for c in caches])
        start += count
    return mx.concatenate(parts, axis=1).astype(mx.float32), caches


def error(made, expected):
    """Root mean square of the difference, of that of the expected logits around their mean."""
    centred = expected - expected.mean(axis=-1, keepdims=True)
    return (mx.mean((made - expected) ** 2) / mx.mean(centred**2)).sqrt().item()


def compressed_parts(caches):
    """The compressed caches among those of a model, those in lists too."""
    flat = [one for cache in caches for one in getattr(cache, "caches", [cache])]
    return [c for c in flat if isinstance(c, (CompressedKVCache, BatchCompressedKVCache))]


@each([*table.FAMILIES, *table.THROUGH])
def test_a_tiny_model(name, tmp_path):
    model = tiny_models.build(name)
    mlx_turboquant_plugin.disable()
    expected, _ = run(model, TOKENS, CHUNKS)

    enable(bypass="identity")
    identity, exact = run(model, TOKENS, CHUNKS)
    assert compressed_parts(exact)
    assert error(identity, expected) < 1e-4

    enable(bypass="bridge")
    bridged, _ = run(model, TOKENS, CHUNKS)
    enable()
    made, caches = run(model, TOKENS, CHUNKS)
    errors = error(identity, expected), error(made, bridged), error(made, expected)
    print(name, *(f"{e:.1e}" for e in errors))
    # Rounding can tip a code at a threshold.
    assert error(made, bridged) < 0.01
    for cache in compressed_parts(caches):
        assert cache.reading.by_view == [not cache.reading.expected] * 2
    # Codes were read. How much logits depend on them is for random weights to say.
    assert 1e-5 < error(made, expected) < 0.3
    check_codes(*(next(filter(has_codes, compressed_parts(c))) for c in (exact, caches)))

    path = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(path, caches)
    loaded = mlx_lm_cache.load_prompt_cache(path)
    more = TOKENS[:, :5]
    after, caches = run(model, more, (4, 1), caches)
    assert error(run(model, more, (4, 1), loaded)[0], after) < 1e-5

    if mlx_lm_cache.can_trim_prompt_cache(caches):
        assert mlx_lm_cache.trim_prompt_cache(caches, 5) == 5
        again, _ = run(model, more, (4, 1), caches)
        assert error(again, after) < 1e-4

    if name not in NO_BATCHES and all(hasattr(cache, "merge") for cache in caches):
        check_batch(model)


class Stage(nn.Module):
    """Runs layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers


class Nested(nn.Module):
    """Runs stages, of which others keep some."""

    def __init__(self):
        super().__init__()
        self.layers = [Stage([nn.ReLU()]), nn.ReLU()]
        self.decoder = Stage(Stage([nn.ReLU()]))
        self.others = {"language": [nn.Sequential(nn.ReLU())], "vision": nn.ReLU()}


def check_parts(model):
    """All modules below ``model`` that have layers are found, each once; how many there are."""
    every = [one for _, one in model.named_modules() if one is not model]
    expected = [id(one) for one in every if "layers" in one or hasattr(type(one), "layers")]
    assert sorted(map(id, whole_passes._with_layers(model))) == sorted(expected)
    return len(expected)


@each([*table.FAMILIES, *table.THROUGH])
def test_all_parts_with_layers_are_guarded(name):
    check_parts(tiny_models.build(name))


def test_parts_with_layers_may_be_anywhere():
    assert check_parts(Nested()) == 4


def has_codes(cache):
    return cache.quantized > cache.first_quantized


def check_codes(exact, cache):
    """In the first layer with codes they differ from what they stand for as their bits do.

    Lloyd-Max at 4 bits leaves 0.0095 of the square of a normal variable (arXiv 2504.19874), and
    uniform codes what ERRORS says; a size for each short vector takes a part of that away. The
    vectors are few, and differ from normal ones.
    """
    keys = exact.codec.decode_keys(exact.key_codes, exact.first_quantized)
    values = exact.codec.decode_values(exact.value_codes)
    decoded_keys = cache.codec.decode_keys(cache.key_codes, cache.first_quantized)
    bias = 0.0
    if cache.codec.bias is not None:
        bias = cache.codec.bias.rotated(cache.first_quantized, keys.shape[2])
        # Were it not the model's own, in its own positions, it would add to the keys.
        assert relative(keys - bias, keys) < max(0.8, 1.05 - relative(bias, keys) / 2)
    weights = 1.0 if cache.codec.balance is None else 1 / cache.codec.balance
    differences, quantized = (
        np.split(cache.codec.sorted(x * weights), cache.codec.spec.segments, axis=-1)
        for x in (decoded_keys - keys, keys - bias)
    )
    for h in range(keys.shape[1]):
        bits = USUAL_BITS if cache.codec.layout is None else cache.codec.layout[h, -1].item()
        expected = (ERRORS[bits], ERRORS[8 - bits]) if len(quantized) == 2 else (0.0095,)
        for difference, x, most in zip(differences, quantized, expected):
            lost = relative(mx.array(difference[:, h]), mx.array(x[:, h]))
            assert 0.4 * most < lost < 1.2 * most
    decoded_values = cache.codec.decode_values(cache.value_codes)
    lost = relative(decoded_values - values, values)
    if cache.codec.spec.value_bits == 8:
        # The rotary part beside a latent: 255 steps over five to six standard deviations.
        assert 1e-6 < lost < 6e-5
    else:
        assert 0.005 < lost < 0.011


def relative(difference, whole):
    return (mx.sum(difference**2) / mx.sum(whole**2)).item()


def check_batch(model):
    """Two sequences decode together as each does alone."""
    prompts = TOKENS[:, :120], TOKENS[:, 40:120]
    new = TOKENS[:, 120:123]
    caches = [run(model, prompt, (prompt.shape[1],))[1] for prompt in prompts]
    batch = _merge_caches(caches)
    together, _ = run(model, mx.concatenate([new, new]), (1, 1, 1), batch)
    for row, single in enumerate(caches):
        expected, _ = run(model, new, (1, 1, 1), single)
        assert error(together[row : row + 1], expected) < 1e-3
        extracted = [cache.extract(row) for cache in batch]
        for one, other in zip(compressed_parts(extracted), compressed_parts(single)):
            assert one.offset == other.offset


@each(sorted(set(table.UNSUPPORTED) - NOT_HERE))
def test_the_others_run_as_they_are_and_say_why(name, caplog):
    model = tiny_models.build(name)
    mlx_turboquant_plugin.disable()
    expected, stock = run(model, TOKENS, CHUNKS)
    enable()
    for _ in range(2):
        made, caches = run(model, TOKENS, CHUNKS)
    assert mx.array_equal(made, expected)
    assert list(map(type, caches)) == list(map(type, stock))
    [line] = [record.getMessage() for record in caplog.records]
    assert line.endswith(f"runs uncompressed: {table.UNSUPPORTED[name]}")


@pytest.mark.parametrize("pattern", ["gemma3", "gemma*", "*/gemma-tiny", "some-org/*"])
def test_one_of_two_models_is_opted_out(pattern):
    left, other = map(tiny_models.build, ("gemma3", "gpt_oss"))
    left.model_path = "cache/models--some-org--gemma/snapshots/0/gemma-tiny"
    enable(opt_out=[pattern])
    assert not compressed_parts(mlx_lm_cache.make_prompt_cache(left))
    assert compressed_parts(mlx_lm_cache.make_prompt_cache(other))
    line = f"gemma3 (some-org/gemma) runs uncompressed: opt_out pattern {pattern!r} matches it"
    assert line in mlx_turboquant_plugin.status().models


# The tables.


def test_every_module_of_mlx_lm_is_in_one_table():
    names = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    tables = [table.FAMILIES, table.THROUGH, table.UNSUPPORTED, table.PARTS]
    listed = [name for one in tables for name in one]
    assert sorted(listed) == sorted(set(listed))
    assert names <= set(listed)
    # Earlier releases lack a few.
    if mlx_lm.__version__ == "0.32.2":
        assert names == set(listed)
    assert {part for parts in table.THROUGH.values() for part in parts.split(", ")} <= set(
        table.FAMILIES
    )


def test_one_entry_point_hooks_every_family():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [point] = project["entry-points"]["mlx_turboquant_plugin"].items()
    mlx_turboquant_plugin.enable()
    hooks = mlx_turboquant_plugin.status().hooks
    assert point in [(hook["module"], hook["function"]) for hook in hooks]
    hooked = {h["module"] for h in hooks if h["function"].endswith(".hook:patch_model")}
    assert hooked == {f"mlx_lm.models.{name}" for name in table.FAMILIES}


def test_the_page_names_every_model():
    page, _ = model_table.PAGE.read_text("utf-8").split("## Programs that ask")
    lines = page.splitlines()
    named = [line.split("|")[1].split()[0] for line in lines if line.startswith("| ")]
    expected = [*table.FAMILIES, *table.THROUGH, *table.UNSUPPORTED]
    assert sorted(n for n in named if n not in ("model", "---")) == sorted(expected)


@pytest.mark.slow
def test_the_page_says_what_becomes_of_every_model():
    page = model_table.PAGE.read_text("utf-8")
    assert model_table.replaced(page) == page


def test_every_reason_is_named():
    model = tiny_models.build("recurrent_gemma")
    mlx_turboquant_plugin.enable(window=64)
    mlx_lm_cache.make_prompt_cache(model)
    line = mlx_turboquant_plugin.status().models[-1]
    assert line.startswith("recurrent_gemma runs uncompressed: ArraysCache is not supported; all ")
    assert line.endswith(" stay in full precision") and line.count("ArraysCache") == 1


def test_a_window_within_what_stays_exact_is_left_to_mlx_lm():
    model = tiny_models.build("gpt_oss")
    expected, _ = run(model, TOKENS, CHUNKS)
    mlx_turboquant_plugin.enable(window=64, bypass="identity")
    kinds = [type(cache) for cache in mlx_lm_cache.make_prompt_cache(model)]
    assert kinds == [RotatingKVCache, CompressedKVCache]
    assert f"of a cache of {tiny_models.WINDOW} " in mlx_turboquant_plugin.status().models[-1]
    made, caches = run(model, TOKENS, CHUNKS)
    assert error(made, expected) < 1e-4
    assert [cache.offset for cache in caches] == [TOKENS.shape[1]] * 2
    check_batch(model)


def test_a_sliding_window_over_a_ring_of_another_size():
    model = tiny_models.build("mistral3")
    expected, _ = run(model, TOKENS, CHUNKS, mlx_lm_cache.make_prompt_cache(model, 120))
    enable(bypass="identity")
    caches = mlx_lm_cache.make_prompt_cache(model, 120)
    assert error(run(model, TOKENS, CHUNKS, caches)[0], expected) < 1e-4
