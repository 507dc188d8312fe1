"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from owl2.runtime.errors import Owl2Error
from owl2.runtime.generate import Answer
from owl2.runtime.scoring.score import Score
from owl2.runtime.serve.answering import Answering
from owl2.runtime.serve.residence import Residence

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts of one server."""

    def __init__(self, residence: Residence, answering: Answering) -> None:
        registry = self._registry = CollectorRegistry()
        self._answers = Counter("owl2_answers", "Answers, by how they ended.", ["finish_reason"], registry=registry)
        self._errors = Counter("owl2_errors", "Requests that were refused or failed.", ["status"], registry=registry)
        self._scores = Counter("owl2_images", "Images that were scored, or failed.", ["result"], registry=registry)
        self._tokens = Counter("owl2_tokens", "Tokens.", ["kind"], registry=registry)
        self._first = Histogram("owl2_time_to_first_token_seconds", "Of an answer.", buckets=SECONDS, registry=registry)
        Gauge("owl2_requests_open", "Being answered or waiting.", registry=registry).set_function(
            lambda: answering.running
        )
        Gauge("owl2_model_loaded", "Whether the model is in memory.", registry=registry).set_function(
            lambda: residence.loaded
        )
        Gauge("owl2_cache_bytes", "Of the K/V caches of past conversations.", registry=registry).set_function(
            lambda: residence.cache_bytes
        )

    def answered(self, answer: Answer) -> None:
        """Count an answer."""
        stats = answer.stats
        self._answers.labels(answer.finish_reason).inc()
        self._tokens.labels("prompt").inc(stats.prompt_tokens - stats.reused_tokens)
        self._tokens.labels("reused").inc(stats.reused_tokens)
        self._tokens.labels("generated").inc(stats.generated_tokens)
        self._first.observe(stats.time_to_first_token)

    def scored(self, scored: Sequence[tuple[Score, ...] | Owl2Error]) -> None:
        """Count images."""
        for scores in scored:
            self._scores.labels("failed" if isinstance(scores, Owl2Error) else "scored").inc()

    def failed(self, status: int) -> None:
        """Count an error."""
        self._errors.labels(str(status)).inc()

    def exposition(self) -> tuple[bytes, str]:
        """Content and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
