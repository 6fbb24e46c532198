"""Do other bits for some layers pay at equal bytes?

The first window tells how much KL each layer's keys and values cost alone; the errors of
scalar codes at other widths follow from the distortions of the codebooks. The bits that
would cost least are then measured on the other windows, beside the default and beside
more bits for the first and the last layer. All choices take the same number of bits.

    python docs/experiments/layers.py --model PATH --tokens FILE
"""

from itertools import product

from common import load, measure

from mlx_turboquant_plugin.codecs.kv_codec import SEGMENTED, KVCodec

# Mean squared error of the codebooks for N(0, 1).
DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497}
KEY_BITS, VALUE_BITS = 4, 3


def bits(choice):
    """A change that gives layer i the key and value bits ``choice[i]``."""

    def change(index, codec):
        key_bits, value_bits = choice[index]
        name = SEGMENTED if key_bits == 4 else "lloyd-max"
        spec = codec.spec._replace(key_codec=name, key_bits=key_bits, value_bits=value_bits)
        return KVCodec(spec, codec.balance, codec.bias, codec.layout)

    return change


def alone(layer, side):
    """A change that leaves codes only to one side of one layer."""
    other = {"key": "value_codec", "value": "key_codec"}[side]

    def change(index, codec):
        exact = (
            {other: "exact"} if index == layer else {"key_codec": "exact", "value_codec": "exact"}
        )
        return KVCodec(codec.spec._replace(**exact), codec.balance, codec.bias, codec.layout)

    return change


def cheapest(costs, total):
    """Bits per (layer, side) that add up to ``total``, the sum of costs as low as can be.

    Every step takes the bit whose absence costs least, from four bits everywhere.
    """
    now = dict.fromkeys(costs, 4)

    def price(place):
        own = now[place]
        return costs[place] * (DISTORTION[own - 1] - DISTORTION[own])

    while sum(now.values()) > total:
        now[min((p for p in now if now[p] > 2), key=price)] -= 1
    return now


def main():
    model, windows, args = load(__doc__)
    layers = range(len(model.layers))
    usual = {"key": KEY_BITS, "value": VALUE_BITS}
    probes = {place: alone(*place) for place in product(layers, usual)}
    found = measure(model, windows[:1], args.chunk, probes)
    costs = {(i, side): d.kl / DISTORTION[usual[side]] for (i, side), d in found.items()}
    total = len(layers) * (KEY_BITS + VALUE_BITS)
    best = cheapest(costs, total)
    rank = sorted(layers, key=lambda i: found[i, "key"].kl + found[i, "value"].kl)
    ends = {layers[0], layers[-1]}
    least = [i for i in rank if i not in ends][: len(ends)]
    choices = {
        "default everywhere": [(KEY_BITS, VALUE_BITS) for _ in layers],
        "keys 3, values 4": [(3, 4) for _ in layers],
        "first and last 4/4": [
            (4, 4) if i in ends else (4, 2) if i in least else (KEY_BITS, VALUE_BITS)
            for i in layers
        ],
        "by the probe": [(best[i, "key"], best[i, "value"]) for i in layers],
    }
    print(f"{args.model}: probed on 1, measured on {args.windows - 1} x {args.length} tokens")
    print(f"{'':19} {'mean KL':>8} {'top-1':>7}  bits K/V of each layer")
    arms = {name: bits(choice) for name, choice in choices.items()}
    for name, d in measure(model, windows[1:], args.chunk, arms).items():
        shown = " ".join(f"{k}/{v}" for k, v in choices[name])
        print(f"{name:19} {d.kl:8.2e} {d.top1:7.2%}  {shown}")


if __name__ == "__main__":
    main()
