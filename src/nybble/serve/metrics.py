"""Figures for Prometheus: of one model, or of several by their names."""

from __future__ import annotations

from collections import Counter as Totals
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nybble.core.outputs import RequestOutput
from nybble.engine.core import EngineStats
from nybble.engine.meter import Work, fraction
from nybble.engine.roofline import Roofline

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Sequences that run.", lambda stats: stats.num_running),
    "num_requests_waiting": ("Sequences that wait.", lambda stats: stats.num_waiting),
    "kv_cache_usage_ratio": ("Share of the cache that running sequences use.", lambda stats: stats.kv_usage),
    "kv_cache_waste_ratio": ("Share of their memory that holds no token.", lambda stats: stats.kv_waste),
    "prefix_cache_hit_ratio": (
        "Share of the prompt tokens that were found in the prefix cache.",
        lambda stats: stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0,
    ),
    "speculation_seconds_saved": (
        "Time that right guesses would have taken one by one, less what wrong ones took.",
        lambda stats: stats.speculation.seconds_saved,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": ("Tokens of prompts that were computed.", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Tokens that were generated.", lambda stats: stats.generation_tokens),
    "prefix_cache_queries": (
        "Prompt tokens looked for in the prefix cache.",
        lambda stats: stats.prefix_queries,
    ),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda stats: stats.prefix_hits),
    "preemptions": (
        "Sequences that had to give their memory back and start again.",
        lambda stats: stats.num_preemptions,
    ),
    "model_seconds": ("Time in the model's steps.", lambda stats: stats.work.seconds),
    "model_read_bytes": ("Bytes that the steps had to read at least.", lambda stats: stats.work.num_bytes),
    "model_operations": (
        "8-bit operations of the steps, a multiply-add counting as two.",
        lambda stats: stats.work.operations,
    ),
    "guessed_tokens": ("Tokens that speculation computed along.", lambda stats: stats.speculation.drafted),
    "accepted_tokens": ("Those of them that were right.", lambda stats: stats.speculation.accepted),
}
_LOADS = "model_loads"


class ModelMetrics:
    """The figures of one model in memory."""

    def __init__(self, shared: Metrics, name: str, stats: Callable[[], EngineStats], size: int) -> None:
        self.name = name
        self.stats = stats
        self.size = size
        self.told = Work()  # what the last roofline ratio was made from
        self._shared = shared

    def finished(self, output: RequestOutput, num_tokens: int) -> None:
        """Count a request that has ended."""
        self._shared.observe(self.name, output, num_tokens)


class Metrics:
    """The registry of one server.

    refused: how many requests admission turned away. roofline: of this machine, if it was measured. by_model: whether
    figures have the label `model`.
    """

    def __init__(self, refused: Callable[[], int], roofline: Roofline | None = None, *, by_model: bool = False) -> None:
        self._refused = refused
        self._roofline = roofline
        self._by_model = by_model
        self._models: list[ModelMetrics] = []
        self._gone: dict[str, Totals[str]] = {}  # by model: totals of the engines that it had before
        labels = ["model"] if by_model else []
        registry = self._registry = CollectorRegistry()
        registry.register(self)
        self._ttft = Histogram(
            "nybble_time_to_first_token_seconds",
            "From arrival to the first token.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self._tpot = Histogram(
            "nybble_time_per_output_token_seconds",
            "Between two tokens of a request, on average.",
            labels,
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._total = Histogram(
            "nybble_request_seconds",
            "From arrival to the last token.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self._queued = Histogram(
            "nybble_queue_seconds",
            "From arrival until it first runs.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self._finished = Counter(
            "nybble_requests_finished", "Requests that have ended.", ["reason", *labels], registry=registry
        )

    def for_model(self, name: str, stats: Callable[[], EngineStats], size: int) -> ModelMetrics:
        """Those of a model that has just been loaded. size: bytes of its weights and cache."""
        metrics = ModelMetrics(self, name, stats, size)
        self._models.append(metrics)
        self._gone.setdefault(name, Totals())[_LOADS] += 1
        return metrics

    def also(self, name: str, metrics: ModelMetrics) -> ModelMetrics:
        """Those of another name of a model's engine: its requests are counted, the engine itself only once."""
        return ModelMetrics(self, name, metrics.stats, metrics.size)

    def forget(self, metrics: ModelMetrics) -> None:
        """The model leaves memory. Its totals stay, so that they never fall."""
        stats = metrics.stats()
        for name, (_, value) in _COUNTERS.items():
            self._gone[metrics.name][name] += value(stats)  # type: ignore[assignment]  # seconds are a float
        self._models.remove(metrics)

    def observe(self, model: str, output: RequestOutput, num_tokens: int) -> None:
        """Count a request that has ended."""
        label = {"model": model} if self._by_model else {}

        def add(histogram: Histogram, seconds: float) -> None:
            (histogram.labels(**label) if label else histogram).observe(seconds)

        reasons = {sample.finish_reason or "abort" for sample in output.outputs} or {"abort"}
        for reason in reasons:
            self._finished.labels(reason=reason, **label).inc()
        times = output.metrics
        if times is None or times.finished_time is None:
            return
        add(self._total, times.finished_time - times.arrival_time)
        if times.first_scheduled_time is not None:
            add(self._queued, times.first_scheduled_time - times.arrival_time)
        if times.first_token_time is not None:
            add(self._ttft, times.first_token_time - times.arrival_time)
            if num_tokens > 1:
                add(self._tpot, (times.finished_time - times.first_token_time) / (num_tokens - 1))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What is read from the engines when somebody asks."""
        labels = ["model"] if self._by_model else []
        stats = {metrics: metrics.stats() for metrics in self._models}

        def told(name: str) -> list[str]:
            return [name] if self._by_model else []

        for key, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"nybble_{key}", text, labels=labels)
            for metrics, now in stats.items():
                gauge.add_metric(told(metrics.name), value(now))
            yield gauge
        if self._roofline is not None:
            yield self._roofline_ratio(self._roofline, stats, labels)
        for key, (text, value) in _COUNTERS.items():
            totals = {name: float(gone[key]) for name, gone in self._gone.items()}
            for metrics, now in stats.items():
                totals[metrics.name] += value(now)
            yield _counter(key, text, labels, {tuple(told(name)): total for name, total in totals.items()})
        yield _counter(
            "requests_refused", "Requests that were told to come back later.", [], {(): float(self._refused())}
        )
        if self._by_model:
            loads: dict[tuple[str, ...], float] = {(name,): float(gone[_LOADS]) for name, gone in self._gone.items()}
            yield _counter(_LOADS, "How often a model was loaded.", labels, loads)
            size = GaugeMetricFamily("nybble_model_memory_bytes", "Estimate for a model in memory.", labels=labels)
            for metrics in self._models:
                size.add_metric(told(metrics.name), metrics.size)
            yield size

    def _roofline_ratio(
        self, roofline: Roofline, stats: dict[ModelMetrics, EngineStats], labels: list[str]
    ) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(
            "nybble_roofline_ratio",
            "Share of the machine's limit that the model reached since last asked.",
            labels=labels,
        )
        for metrics, now in stats.items():
            share = fraction(metrics.told, now.work, roofline.read_gb_s, roofline.int8_gops)
            metrics.told = now.work
            gauge.add_metric([metrics.name] if labels else [], share)
        return gauge


def _counter(key: str, text: str, labels: list[str], values: dict[tuple[str, ...], float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"nybble_{key}", text, labels=labels)
    for label, value in values.items():
        family.add_metric(label, value)
    return family
