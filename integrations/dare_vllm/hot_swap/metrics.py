"""What vLLM's /metrics says of swaps."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

__all__ = ["record_failure", "record_swap"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

_swaps = Counter(
    "vllm:dare_swaps", "Swaps of the mixture, by route and result.", ["route", "result"]
)
_seconds = Histogram(
    "vllm:dare_swap_seconds",
    "Time of a swap; 'write' is the part in which no request runs.",
    ["route", "phase"],
    buckets=_SECONDS,
)
_adapters = Gauge(
    "vllm:dare_mixture_adapters", "Adapters in the mixture.", multiprocess_mode="mostrecent"
)


def record_swap(route: str, adapters: int, write: float, total: float) -> None:
    """A swap that was made; times in seconds."""
    _swaps.labels(route, "done").inc()
    _seconds.labels(route, "write").observe(write)
    _seconds.labels(route, "total").observe(total)
    _adapters.set(adapters)


def record_failure(route: str, result: str) -> None:
    """A swap that was refused before it began, or failed and was undone."""
    _swaps.labels(route, result).inc()
