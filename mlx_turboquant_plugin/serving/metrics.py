"""``GET /metrics`` of mlx_lm.server, in Prometheus' text format."""

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from ..attention.fused import fallbacks
from ..backends.choice import kernel_of
from ..settings import in_force
from .counts import DISK, MEMORY
from .served import Served

if TYPE_CHECKING:
    from prometheus_client import Metric

MISSING = (
    "metrics need the package prometheus-client: pip install 'mlx-turboquant-plugin[server]'\n"
)


def answer(handler: Any, served: Served) -> None:
    """Answer a request for the page of ``served``; with 501 where the library is missing."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_LATEST
    except ImportError:
        _send(handler, HTTPStatus.NOT_IMPLEMENTED, "text/plain; charset=utf-8", MISSING.encode())
        return
    served.ask()
    registry = CollectorRegistry()
    registry.register(_Page(served))
    _send(handler, HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))


def _send(handler: Any, status: HTTPStatus, content_type: str, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


# One value, or one for each tuple of labels.
Values = float | Mapping[Any, float]


class _Page:
    """A collector of Prometheus' library."""

    def __init__(self, served: Served):
        self._served = served

    def collect(self) -> Iterator["Metric"]:
        counts, store, admission = self._served.counts, self._served.store, self._served.admission
        nbytes = {
            (caches, form): value
            for caches, values in self._served.nbytes.items()
            for form, value in zip(("compressed", "uncompressed"), values)
        }
        yield _gauge(
            "kv_bytes",
            "KV caches in memory: as they are, and as they would be uncompressed.",
            nbytes,
            ("caches", "form"),
        )
        sources = {(source,) for source in (MEMORY, DISK)}
        yield _counter(
            "prompt_cache_hits",
            "Prompts whose beginning was found.",
            {source: counts.hits[source[0]] for source in sources},
            ("source",),
        )
        yield _counter(
            "prompt_cache_tokens_saved",
            "Tokens of prompts that were found.",
            {source: counts.tokens_saved[source[0]] for source in sources},
            ("source",),
        )
        yield _counter("prompt_cache_misses", "Prompts of which nothing was found.", counts.misses)
        yield _counter(
            "requests_refused", "Requests that can never fit the memory budget.", counts.refused
        )
        waiting = 0 if admission is None else admission.waiting
        yield _gauge("requests_waiting", "Requests that wait for room.", waiting)
        if admission is not None:
            yield _gauge("memory_budget_bytes", "The setting memory_budget.", admission.limit)
        if store.disk is not None:
            sizes = [size for _, size in store.disk.files()]
            yield _gauge("disk_cache_files", "Prompt caches on disk.", len(sizes))
            yield _gauge("disk_cache_bytes", "Bytes of the prompt caches on disk.", sum(sizes))
            yield _gauge(
                "disk_cache_pending_bytes", "Caches that are being written.", store.disk.pending
            )
            yield _counter("disk_cache_written", "Prompt caches written to disk.", counts.written)
        kernel = kernel_of(in_force().general)
        yield _gauge("kernel", "The kernel of the attention.", {(kernel,): 1}, ("kernel",))
        left = {(reason,): 1 for reason in fallbacks()}
        yield _gauge("fallback", "What that kernel left to another.", left, ("reason",))


def _gauge(name: str, text: str, values: Values, labels: tuple[str, ...] = ()) -> "Metric":
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(f"turboquant_{name}", text, labels=labels), values)


def _counter(name: str, text: str, values: Values, labels: tuple[str, ...] = ()) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(f"turboquant_{name}", text, labels=labels), values)


def _filled(family: Any, values: Values) -> "Metric":
    for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        family.add_metric(labels, value)
    return family
