"""Run the toy model over 400 tokens; its logits go to the file named by the argument."""

import sys

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from toy_models.toy import Model

mx.random.seed(0)
model = Model()
mx.eval(model.parameters())
tokens = mx.random.randint(0, 64, (1, 400))
caches = make_prompt_cache(model)
logits = [model(tokens[:, start : start + 100], caches) for start in range(0, 400, 100)]
mx.save(sys.argv[1], mx.concatenate(logits, axis=1))
print(*(type(cache).__name__ for cache in caches), caches[0].nbytes)
