"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nybble.core.outputs import RequestOutput
from nybble.engine.core import EngineStats
from nybble.engine.meter import Work, fraction
from nybble.engine.roofline import Roofline

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class _EngineCollector:
    """Reads the engine when it is asked."""

    def __init__(self, stats: Callable[[], EngineStats], refused: Callable[[], int], roofline: Roofline | None) -> None:
        self._stats = stats
        self._refused = refused
        self._roofline = roofline
        self._told = Work()

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        gauges = {
            "num_requests_running": ("Sequences that run.", stats.num_running),
            "num_requests_waiting": ("Sequences that wait.", stats.num_waiting),
            "kv_cache_usage_ratio": ("Share of the cache that running sequences use.", stats.kv_usage),
            "kv_cache_waste_ratio": ("Share of their memory that holds no token.", stats.kv_waste),
            "prefix_cache_hit_ratio": (
                "Share of the prompt tokens that were found in the prefix cache.",
                stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0,
            ),
        }
        gauges["speculation_seconds_saved"] = (
            "Time that right guesses would have taken one by one, less what wrong ones took.",
            stats.speculation.seconds_saved,
        )
        if self._roofline is not None:
            share = fraction(self._told, stats.work, self._roofline.read_gb_s, self._roofline.int8_gops)
            self._told = stats.work
            gauges["roofline_ratio"] = ("Share of the machine's limit that the model reached since last asked.", share)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"nybble_{name}", text, value)
        counters = {
            "prompt_tokens": ("Tokens of prompts that were computed.", stats.prompt_tokens),
            "generation_tokens": ("Tokens that were generated.", stats.generation_tokens),
            "prefix_cache_queries": ("Prompt tokens looked for in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.prefix_hits),
            "preemptions": ("Sequences that had to give their memory back and start again.", stats.num_preemptions),
            "model_seconds": ("Time in the model's steps.", stats.work.seconds),
            "model_read_bytes": ("Bytes that the steps had to read at least.", stats.work.num_bytes),
            "model_operations": (
                "8-bit operations of the steps, a multiply-add counting as two.",
                stats.work.operations,
            ),
            "guessed_tokens": ("Tokens that speculation computed along.", stats.speculation.drafted),
            "accepted_tokens": ("Those of them that were right.", stats.speculation.accepted),
            "requests_refused": ("Requests that were told to come back later.", self._refused()),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"nybble_{name}", text, value)


class Metrics:
    """The registry of one server."""

    def __init__(
        self, stats: Callable[[], EngineStats], refused: Callable[[], int], roofline: Roofline | None = None
    ) -> None:
        """refused: how many requests admission turned away. roofline: of this machine, if it was measured."""
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, refused, roofline))
        registry = self._registry
        self._ttft = Histogram(
            "nybble_time_to_first_token_seconds",
            "From arrival to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._tpot = Histogram(
            "nybble_time_per_output_token_seconds",
            "Between two tokens of a request, on average.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._total = Histogram(
            "nybble_request_seconds", "From arrival to the last token.", buckets=_SECONDS, registry=registry
        )
        self._queued = Histogram(
            "nybble_queue_seconds", "From arrival until it first runs.", buckets=_SECONDS, registry=registry
        )
        self._finished = Counter("nybble_requests_finished", "Requests that have ended.", ["reason"], registry=registry)

    def finished(self, output: RequestOutput, num_tokens: int) -> None:
        """Count a request that has ended."""
        reasons = {sample.finish_reason or "abort" for sample in output.outputs} or {"abort"}
        for reason in reasons:
            self._finished.labels(reason).inc()
        times = output.metrics
        if times is None or times.finished_time is None:
            return
        self._total.observe(times.finished_time - times.arrival_time)
        if times.first_scheduled_time is not None:
            self._queued.observe(times.first_scheduled_time - times.arrival_time)
        if times.first_token_time is not None:
            self._ttft.observe(times.first_token_time - times.arrival_time)
            if num_tokens > 1:
                self._tpot.observe((times.finished_time - times.first_token_time) / (num_tokens - 1))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
