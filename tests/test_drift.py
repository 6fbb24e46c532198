"""The drift probe against loops in NumPy, and the command."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_models

from mlx_turboquant_plugin.cache import Visibility
from mlx_turboquant_plugin.cli import main
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec
from mlx_turboquant_plugin.tools.drift import LayerDrift, Probe, _queries_seen, outstanding
from mlx_turboquant_plugin.tools.runs import prompt_cache

VISIBILITY = Visibility(32, 4)


def observed(codec, chunks, queries, keys, values, scale):
    probe, start = Probe(codec, VISIBILITY), 0
    for count in chunks:
        part = slice(start, start + count)
        probe.update_and_fetch(keys[:, :, part], values[:, :, part])
        probe.observe(queries[:, :, part], scale)
        start += count
    return probe.sums


def expected(codec, queries, keys, values, scale):
    quantized_k = np.array(codec.decode_keys(codec.encode_keys(keys, 0), 0))[0]
    quantized_v = np.array(codec.decode_values(codec.encode_values(values)))[0]
    q, k, v = (np.array(x)[0] for x in (queries, keys, values))
    groups = q.shape[0] // k.shape[0]
    sums = np.zeros((k.shape[0], 6))
    for head in range(q.shape[0]):
        own = head // groups
        for position in range(q.shape[1]):
            begins = VISIBILITY.full_from(position)
            quantized = [VISIBILITY.sinks <= t < begins for t in range(position + 1)]
            if not any(quantized):
                continue
            ks = np.where(
                np.array(quantized)[:, None],
                quantized_k[own, : position + 1],
                k[own, : position + 1],
            )
            vs = np.where(
                np.array(quantized)[:, None],
                quantized_v[own, : position + 1],
                v[own, : position + 1],
            )
            exact = scale * k[own, : position + 1] @ q[head, position]
            other = scale * ks @ q[head, position]
            p, r = (np.exp(s - s.max()) / np.exp(s - s.max()).sum() for s in (exact, other))
            output = p @ v[own, : position + 1]
            error = other - exact
            sums[own] += [
                p @ error**2 - (p @ error) ** 2,
                ((r @ v[own, : position + 1] - output) ** 2).sum(),
                ((p @ vs - output) ** 2).sum(),
                ((r @ vs - output) ** 2).sum(),
                (output**2).sum(),
                1,
            ]
    return sums


@pytest.mark.parametrize("chunks", [[150], [40, 40, 40, 30]])
def test_probe_is_what_loops_find(chunks):
    mx.random.seed(3)
    queries, keys, values = (mx.random.normal((1, heads, 150, 64)) for heads in (4, 2, 2))
    codec = KVCodec(CodecSpec(64, 64, "lloyd-max", 3, "lloyd-max", 2))
    found = observed(codec, chunks, queries, keys, values, 0.3)
    np.testing.assert_allclose(
        found, expected(codec, queries, keys, values, 0.3), rtol=2e-3, atol=1e-5
    )


def test_exact_codecs_do_not_drift():
    queries, keys, values = (mx.random.normal((1, heads, 150, 64)) for heads in (4, 2, 2))
    codec = KVCodec(CodecSpec(64, 64, "exact", 4, "exact", 4))
    found = observed(codec, [150], queries, keys, values, 0.125)
    assert (found[:, :4] < 1e-8).all() and (found[:, 4:] > 1).all()


def test_layers_that_stand_out():
    layers = [LayerDrift(i, 0, 0, 0, 0, kl) for i, kl in enumerate((1e-4, 9e-4, 2e-4, 2e-4))]
    assert [layer.layer for layer in outstanding(layers)] == [1]


def test_command(tmp_path, capsys):
    path = tmp_path / "drift.json"
    code = main(
        ["drift", "--model", str(tiny.PATHS["tiny-qwen2"]), "--length", "280", "--preset", "small"]
        + ["--text", str(tiny.TEXT), "--heads", "--json", str(path)]
    )
    assert code == 0
    found = json.loads(path.read_text())
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    assert len(found["heads"]) == 8
    for layer in found["layers"]:
        assert 0 < layer["keys"] < layer["both"] and 0 < layer["values"] < 0.5
        assert 0 < layer["kl"] < 0.1 and 0 < layer["score"] < 1
    assert capsys.readouterr().out.count("\n") > 12


def test_attention_that_takes_cache_and_scale_by_position():
    model = tiny_models.build("gpt_oss")
    caches = prompt_cache(model)
    caches[1] = Probe(KVCodec(CodecSpec(32, 32, "lloyd-max", 3, "lloyd-max", 2)), VISIBILITY)
    with _queries_seen(model):
        model(mx.arange(100)[None] % 64, cache=caches)
    assert caches[1].sums.shape == (2, 6) and (caches[1].sums > 0).all()


def test_text_that_is_too_short(caplog):
    arguments = ["drift", "--model", str(tiny.PATHS["tiny-llama"]), "--length", "100"]
    assert main([*arguments, "--text", str(tiny.TEXT)]) == 2
    assert "--length is 100" in caplog.text and "more than 196" in caplog.text
