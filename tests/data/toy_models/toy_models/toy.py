"""A model of one's own: two layers of attention, with names like nobody else's."""

import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

DIM, HEADS, KV_HEADS, HEAD_DIM = 128, 4, 2, 32


class ToyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.kv_heads = HEADS, KV_HEADS
        self.wq = nn.Linear(DIM, HEADS * HEAD_DIM)
        self.wk = nn.Linear(DIM, KV_HEADS * HEAD_DIM)
        self.wv = nn.Linear(DIM, KV_HEADS * HEAD_DIM)
        self.wo = nn.Linear(HEADS * HEAD_DIM, DIM)
        self.rotary = nn.RoPE(HEAD_DIM)

    def __call__(self, x, mask, cache):
        queries, keys, values = (
            w(x).reshape(*x.shape[:2], -1, HEAD_DIM).swapaxes(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        queries = self.rotary(queries, offset=cache.offset)
        keys = self.rotary(keys, offset=cache.offset)
        keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=HEAD_DIM**-0.5, mask=mask
        )
        return self.wo(out.swapaxes(1, 2).reshape(*x.shape[:2], -1))


class ToyLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(DIM), ToyAttention()

    def __call__(self, x, mask, cache):
        return x + self.attention(self.norm(x), mask, cache)


class Model(nn.Module):
    model_type = "toy"

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, DIM)
        self.layers = [ToyLayer() for _ in range(2)]

    def __call__(self, tokens, cache):
        x = self.embedding(tokens)
        mask = create_attention_mask(x, cache[0])
        for layer, one in zip(self.layers, cache):
            x = layer(x, mask, one)
        return self.embedding.as_linear(x)
