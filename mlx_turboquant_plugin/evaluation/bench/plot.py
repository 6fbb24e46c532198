"""Speed and memory against length, as a PNG. Needs matplotlib, which is an extra."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from ...rules import SettingsError
from .measurement import BATCH_KVCACHE, COMPRESSED, KVCACHE, QUANTIZED, Measurement, Results

# Okabe and Ito's colours, which everybody can tell apart.
COLOURS = {
    KVCACHE: "#000000",
    BATCH_KVCACHE: "#999999",
    QUANTIZED: "#E69F00",
    COMPRESSED: "#0072B2",
}
# One for each dtype and batch size.
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
MIB = 2**20


class Panel(NamedTuple):
    """One diagram: some figure of a part against the number of tokens."""

    part: str
    title: str
    unit: str
    figure: Callable[[Measurement], float]


PANELS = (
    Panel("call", "one layer, a step from Python", "ms", lambda m: 1e3 * m.seconds.median),
    Panel("chain", "one layer, inside a chain", "ms", lambda m: 1e3 * m.seconds.median),
    Panel("decode", "decoding", "tokens/s", lambda m: m.processed / m.seconds.median),
    Panel("prefill", "prompt", "tokens/s", lambda m: m.processed / m.seconds.median),
    Panel("prefill", "prompt, the first time", "tokens/s", lambda m: m.processed / m.first),
    Panel("decode", "cache", "MiB", lambda m: m.cache_bytes / MIB),
    Panel("decode", "decoding, peak memory", "MiB", lambda m: m.peak_bytes / MIB),
    Panel("prefill", "prompt, peak memory", "MiB", lambda m: m.peak_bytes / MIB),
)
COLUMNS = 3


def check() -> None:
    """Raise SettingsError unless diagrams can be drawn."""
    if find_spec("matplotlib") is None:
        raise SettingsError(
            "--plot needs matplotlib, which is not installed: "
            "pip install 'mlx-turboquant-plugin[plot]', or leave --plot out"
        )


def draw(path: Path, notes: Dict[str, Any], results: Results) -> None:
    """Draw what was measured to the file ``path``, a PNG whatever it is called."""
    # Drawing to a file needs neither a window system nor pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # An interrupted run may have others, which have not had a turn.
    measured = [m for m in results.measurements if m.samples]
    parts = {m.part for m in measured}
    kinds = list(dict.fromkeys((m.dtype, m.batch) for m in measured))
    panels = [panel for panel in PANELS if panel.part in parts]
    columns = max(1, min(COLUMNS, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{notes['device']}, kernel {notes['kernel']}; {notes['model']}", fontsize=10)
    for index, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, index)
        _panel(axes, panel, [m for m in measured if m.part == panel.part], kinds)
    # Many panels share few lines: one legend, where it hides none of them.
    legend = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, format="png", dpi=150)


def _panel(
    axes: Any, panel: Panel, measured: List[Measurement], kinds: List[Tuple[str, int]]
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for index, kind in enumerate(kinds):
        style = LINES[index % len(LINES)] + MARKERS[index % len(MARKERS)]
        for cache, colour in COLOURS.items():
            points = sorted(
                (m.tokens, panel.figure(m))
                for m in measured
                if (m.dtype, m.batch, m.cache) == (*kind, cache)
            )
            if points:
                label = f"{cache}, {kind[0]}, batch {kind[1]}"
                axes.plot(*zip(*points), style, color=colour, label=label, ms=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({m.tokens for m in measured})
    axes.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    # Steps of ten alone would leave most diagrams with a single number.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("tokens")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)
