"""The cases of ``mlx_turboquant selftest``: shapes, codecs, dtypes and what caches hold."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product

from ..backends.fused import MAX_QUERIES

DTYPES = ("float32", "float16", "bfloat16")
SHORT = {"affine": "a", "segmented": "s"}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        dim: D, of the keys; ``value_dim`` of the values.
        groups: query heads for each KV head.
        count: N, the number of queries.
        lengths: tokens of each sequence, the queries' included; several are a batch.
        keys, values: "lloyd-max", "affine" or, for keys, "segmented", and bits.
        extras: with a key bias and balanced, sorted keys; ``rope`` is how positions are encoded:
            "halves", "traditional" or "partial".
        ring: the ``max_kv_size`` of a cache that forgets, or 0.
        steps: how many of the tokens come one by one before the queries, as in decoding.
        invariant: whether prompts follow the rule of positions.
        learned: with learned sinks.
    """

    dim: int = 128
    value_dim: int = 128
    groups: int = 4
    count: int = 1
    lengths: tuple[int, ...] = (333,)
    keys: tuple[str, int] = ("lloyd-max", 4)
    values: tuple[str, int] = ("lloyd-max", 3)
    dtype: str = "float32"
    extras: bool = False
    rope: str = "halves"
    ring: int = 0
    steps: int = 0
    invariant: bool = False
    learned: bool = False

    @property
    def segmented(self) -> bool:
        """Whether keys are cut in two."""
        return self.keys[0] == "segmented"

    def __str__(self):
        dims = str(self.dim) if self.dim == self.value_dim else f"{self.dim}/{self.value_dim}"
        codecs = "".join(
            f" {side}{bits}{SHORT.get(codec, '')}"
            for side, (codec, bits) in (("K", self.keys), ("V", self.values))
        )
        lengths = ",".join(map(str, self.lengths))
        text = f"D={dims} GQA={self.groups} N={self.count} T={lengths}{codecs} {self.dtype}"
        text += " bias," + self.rope if self.extras else ""
        text += f" ring={self.ring}" if self.ring else ""
        text += f" steps={self.steps}" if self.steps else ""
        text += " invariant" if self.invariant else ""
        return text + (" learned sinks" if self.learned else "")


def case(dim: int = 128, **values) -> Case:
    """A case whose values have the dimension of its keys."""
    return Case(dim, **{"value_dim": dim, **values})


DIMS = (64, 80, 96, 112, 128, 256)
LLOYD_MAX = [(("lloyd-max", k), ("lloyd-max", v)) for k, v in product((2, 3, 4), repeat=2)]
AFFINE = [(("affine", bits), ("affine", bits)) for bits in (2, 3, 4, 8)]
MIXED = [(("lloyd-max", 3), ("affine", 4)), (("affine", 4), ("lloyd-max", 3))]
SEGMENTED = ("segmented", 4)
CUT = [(SEGMENTED, ("lloyd-max", bits)) for bits in (2, 4)]
CODECS = (*CUT, *AFFINE, *LLOYD_MAX, *MIXED)
GROUPS = (*range(1, 9), 12, 16)
ROPES = ("halves", "traditional", "partial")

# Every branch of every kernel, in few enough cases for an emulator.
QUICK = (
    case(64, groups=1),
    case(64, groups=3, count=5, extras=True),
    case(80, groups=2, lengths=(300,), keys=("lloyd-max", 3), values=("lloyd-max", 2)),
    case(80, groups=8, count=2, extras=True, rope="traditional", dtype="float16"),
    case(96, groups=2, keys=("affine", 3), values=("affine", 3)),
    case(112, groups=5, keys=("lloyd-max", 2), values=("lloyd-max", 4), dtype="bfloat16"),
    case(128, groups=4, lengths=(700,), dtype="float16"),
    case(128, groups=8, keys=("lloyd-max", 3), values=("lloyd-max", 3), lengths=(1300,)),
    case(128, groups=1, lengths=(101,), keys=("affine", 4), values=("affine", 4)),
    case(128, groups=2, lengths=(5, 170, 333, 69), extras=True, rope="partial"),
    case(128, groups=6, count=8, lengths=(196,), keys=("lloyd-max", 2), values=("affine", 2)),
    case(256, groups=7, lengths=(260,), extras=True, dtype="bfloat16"),
    case(256, groups=1, keys=("affine", 8), values=("affine", 8)),
    case(256, groups=2, keys=("affine", 2), values=("lloyd-max", 4), lengths=(330, 290)),
    case(64, groups=2, lengths=(430,), extras=True, ring=263),
    Case(192, 128, groups=2, keys=("lloyd-max", 3), values=("lloyd-max", 2)),
    case(128, groups=4, steps=3, dtype="bfloat16"),
    case(64, groups=2, count=3, steps=2),
    case(64, groups=3, keys=SEGMENTED, values=("lloyd-max", 4), extras=True),
    case(80, groups=2, count=3, keys=SEGMENTED, extras=True, rope="traditional", dtype="float16"),
    case(128, groups=4, lengths=(101, 700), keys=SEGMENTED, extras=True, rope="partial", steps=2),
    case(256, groups=2, keys=SEGMENTED, values=("lloyd-max", 2), dtype="bfloat16"),
    # With learned sinks, whose scores those of a large bias would leave far behind.
    case(64, groups=2, count=3, steps=2, learned=True),
    Case(80, 80, 2, 1, (300,), ("lloyd-max", 3), ("lloyd-max", 2), learned=True),
    case(128, groups=4, lengths=(300, 170), dtype="float16", learned=True),
    case(128, groups=1, lengths=(101,), keys=("affine", 4), values=("affine", 4), learned=True),
    case(64, groups=1, lengths=(430,), ring=263, learned=True),
    # Prompts, by the kernels that the cases above have compiled.
    case(64, groups=1, count=40),
    case(64, groups=3, count=17, lengths=(337,), extras=True),
    case(80, groups=2, count=100, lengths=(300,), keys=("lloyd-max", 3), values=("lloyd-max", 2)),
    case(96, groups=2, count=20, keys=("affine", 3), values=("affine", 3)),
    case(128, groups=2, count=40, lengths=(40, 170, 333), extras=True, rope="partial"),
    case(256, groups=1, count=70, keys=("affine", 2), values=("lloyd-max", 4)),
    case(64, groups=2, count=40, lengths=(430,), extras=True, ring=263),
    case(64, groups=2, count=100, extras=True, invariant=True),
    case(64, groups=3, count=40, keys=SEGMENTED, values=("lloyd-max", 4), extras=True),
    case(80, groups=2, count=20, keys=SEGMENTED, extras=True, rope="traditional"),
    case(128, groups=2, count=40, lengths=(40, 333), keys=SEGMENTED, extras=True, rope="partial"),
    # Latents with the rotary part beside them, and layers as wide.
    Case(512, 64, 2, 20, (300,), values=("affine", 8), extras=True, dtype="bfloat16"),
    case(512, groups=2, count=20, keys=SEGMENTED, values=("lloyd-max", 4), lengths=(260,)),
    # Too many queries for decoding and too few for a prompt.
    case(128, groups=4, count=12, steps=3, dtype="bfloat16"),
    case(64, groups=1, count=40, learned=True),
)


def table(everything: bool = False) -> Iterator[Case]:
    """All cases, or a part of them with every setting and most pairs of settings.

    On a GPU most of the time goes into compiling kernels, for each combination of dims, bits
    and dtypes. So the part leaves out most of the products of these, and nothing else.
    """
    yield from QUICK
    for apart, cases in (*_decoding(), *_prompts()):
        yield from list(cases)[:: 1 if everything else apart]


# One case in so many for a part of the table. The numbers have no factor in common with the
# lengths of the axes, so that the values of each are shared out evenly.
Share = tuple[int, Iterable[Case]]


def _decoding() -> Iterator[Share]:
    """Dims with codecs, with groups, with dtypes and numbers of queries; lengths."""
    yield 7, _codecs((1, 1, 2, 1, 7, 8))
    counts = cycle((1, 1, 2, 1, 7, 8))
    yield (
        23,
        (
            case(dim, groups=group, count=next(counts), lengths=(200,))
            for dim, group in product(DIMS, GROUPS)
        ),
    )
    yield (
        25,
        (
            case(dim, groups=2, count=count, dtype=dtype, lengths=(270,), extras=count % 2 == 0)
            for dim, dtype, count in product(DIMS, DTYPES, range(1, MAX_QUERIES + 1))
        ),
    )
    lengths = 69, 97, 101, 129, 133, 161, 197, 228, 229, 230, 512, 1024, 2085, 4100, 16500
    yield 1, (case(lengths=(length,)) for length in lengths)
    # With positions grow the angles, and what fp32 leaves unknown about a bias.
    yield (
        1,
        (
            case(64, groups=2, lengths=(length,), keys=("lloyd-max", 3), extras=length < 4000)
            for length in lengths
        ),
    )
    yield (
        11,
        (
            case(dim, groups=2, extras=True, rope=rope, count=count, keys=SEGMENTED, lengths=(270,))
            for rope, dim, count in product(ROPES, DIMS, (1, 4))
        ),
    )
    yield (
        1,
        (
            # The angles of a bias are off by more than others are, at far positions.
            case(
                lengths=lengths,
                groups=4,
                keys=SEGMENTED,
                values=("lloyd-max", 4),
                extras=lengths[0] < 10_000,
            )
            for lengths in ((4100,), (16500,), (129,) * 5, (700, 50))
        ),
    )
    yield 1, [case(64, groups=16, lengths=(640,), keys=SEGMENTED, extras=True, ring=333)]
    yield 1, _batches(1, (4, 5))
    yield (
        7,
        (
            case(dim, groups=2, extras=True, rope=rope, lengths=(500,))
            for rope, dim in product(ROPES, DIMS)
        ),
    )
    yield 1, _rings(1)
    dtypes = cycle(DTYPES)
    yield (
        1,
        (
            case(lengths=lengths, groups=2, steps=steps, dtype=next(dtypes))
            for steps, lengths in product((1, 2, 36), ((300,), (190, 260)))
        ),
    )
    # So many tokens that every part of a kernel has more than one turn.
    yield 1, [case(lengths=(40_000,))]


def _prompts() -> Iterator[Share]:
    """The same with more queries than a kernel for decoding takes."""
    many = 17, 40, 100, 300
    yield 7, _codecs(many)
    counts = cycle(many)
    yield (
        11,
        (
            case(
                dim,
                groups=2,
                count=next(counts),
                dtype=dtype,
                lengths=(500,),
                extras=True,
                rope=rope,
            )
            for dim, dtype, rope in product(DIMS, DTYPES, ROPES)
        ),
    )
    yield (
        1,
        (
            case(groups=group, count=next(counts), lengths=(400,), keys=("lloyd-max", 3))
            for group in GROUPS
        ),
    )
    # Before them is nothing, too few tokens for codes, or codes up to anywhere.
    yield (
        1,
        (
            case(64, groups=2, count=count, lengths=(before + count,), extras=True)
            for count, before in product((9, 16, 17, 31, 32, 33, 300), (0, 4, 96, 101, 352, 2085))
        ),
    )
    yield 1, _batches(40, (40, 45))
    for count in (12, 17, 99):
        yield 1, _rings(count)
    yield (
        1,
        (
            case(64, groups=1, count=count, lengths=lengths, extras=True, invariant=True)
            for count, lengths in product((17, 100), ((333,), (190, 260), (100, 420)))
        ),
    )
    yield (
        1,
        (
            case(count=count, lengths=lengths, groups=2, steps=steps)
            for steps, count, lengths in product((1, 36), (12, 40), ((300,), (190, 260)))
        ),
    )
    yield 1, [case(groups=1, count=200, lengths=(4100,))]


def _codecs(counts: Sequence[int]) -> Iterator[Case]:
    settings = zip(cycle((1, 2, 4, 8, 3)), cycle(counts), cycle(DTYPES))
    for (groups, count, dtype), (dim, (keys, values)) in zip(settings, product(DIMS, CODECS)):
        yield case(
            dim, groups=groups, count=count, keys=keys, values=values, dtype=dtype, lengths=(427,)
        )


def _batches(count: int, shortest: tuple[int, ...]) -> Iterator[Case]:
    several = (69, 101, 333), (700, 50), (129,) * 5, tuple(range(100, 500, 50))
    for lengths, dim in product((shortest, *several), (80, 128)):
        yield case(dim, count=count, lengths=lengths, groups=2, extras=len(lengths) == 3)


def _rings(count: int) -> Iterator[Case]:
    for ring, length in product((100, 150, 333), (99, 150, 640)):
        yield case(count=count, lengths=(length,), ring=ring, extras=ring == 333)
