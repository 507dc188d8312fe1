"""On-device runtime for the mPLUG-Owl2 family: quantized bundles, no torch at run time.

Example::

    from owl2 import Owl2

    with Owl2.load("bundle/") as owl:
        chat = owl.chat()
        print(chat.ask("What is in the image?", images=["a.jpg"]).text)
        for chunk in chat.stream("And its colour?"):
            print(chunk.text, end="", flush=True)

Names are imported when they are first used, so that ``import owl2`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from owl2.runtime.bench.bench import BenchProgress as BenchProgress, bench as bench
    from owl2.runtime.bench.result import BenchResult as BenchResult
    from owl2.runtime.bundle import (
        Bundle as Bundle,
        Manifest as Manifest,
    )
    from owl2.runtime.chat import (
        Chat as Chat,
    )
    from owl2.runtime.encoded import EncodedImage as EncodedImage
    from owl2.runtime.errors import (
        BackendError as BackendError,
        BackendUnavailableError as BackendUnavailableError,
        BundleCorruptError as BundleCorruptError,
        BundleError as BundleError,
        BundleVersionError as BundleVersionError,
        BusyError as BusyError,
        CalibrationError as CalibrationError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        ContextOverflowError as ContextOverflowError,
        DataError as DataError,
        ExportError as ExportError,
        ImageError as ImageError,
        InsufficientMemoryError as InsufficientMemoryError,
        Owl2Error as Owl2Error,
        Owl2Warning as Owl2Warning,
        ParityError as ParityError,
        PromptError as PromptError,
        QuantizationError as QuantizationError,
        ReferenceModelError as ReferenceModelError,
        SavedChatError as SavedChatError,
    )
    from owl2.runtime.evaluation.evaluate import (
        Evaluation as Evaluation,
        EvaluationProgress as EvaluationProgress,
        evaluate as evaluate,
    )
    from owl2.runtime.evaluation.verify import Verdict as Verdict, verify as verify
    from owl2.runtime.fit.plan import Plan as Plan, plan as plan
    from owl2.runtime.generate import (
        Answer as Answer,
        Chunk as Chunk,
        FinishReason as FinishReason,
        Stats as Stats,
    )
    from owl2.runtime.image_files import ImageRecord as ImageRecord
    from owl2.runtime.likelihood import ChoiceLikelihoods as ChoiceLikelihoods
    from owl2.runtime.owl import Owl2 as Owl2
    from owl2.runtime.preprocess import ImageReading as ImageReading
    from owl2.runtime.sampling import GenerationConfig as GenerationConfig
    from owl2.runtime.saved_chat import saved_messages as saved_messages
    from owl2.runtime.scoring.adapters import (
        Metric as Metric,
        OneAlign as OneAlign,
        create_metric as create_metric,
    )
    from owl2.runtime.scoring.batches import BatchScorer as BatchScorer
    from owl2.runtime.scoring.score import Score as Score
    from owl2.runtime.scoring.scorer import Scorer as Scorer
    from owl2.runtime.scoring.video import VideoScore as VideoScore
    from owl2.runtime.stream import AnswerStream as AnswerStream
    from owl2.runtime.verification import LoadProgress as LoadProgress
    from owl2.runtime.version import __version__ as __version__

_HOMES = {
    "owl2.runtime.bench.bench": ("BenchProgress", "bench"),
    "owl2.runtime.bench.result": ("BenchResult",),
    "owl2.runtime.bundle": ("Bundle", "Manifest"),
    "owl2.runtime.chat": ("Chat",),
    "owl2.runtime.encoded": ("EncodedImage",),
    "owl2.runtime.likelihood": ("ChoiceLikelihoods",),
    "owl2.runtime.saved_chat": ("saved_messages",),
    "owl2.runtime.scoring.adapters": ("Metric", "OneAlign", "create_metric"),
    "owl2.runtime.scoring.batches": ("BatchScorer",),
    "owl2.runtime.scoring.score": ("Score",),
    "owl2.runtime.scoring.scorer": ("Scorer",),
    "owl2.runtime.scoring.video": ("VideoScore",),
    "owl2.runtime.stream": ("AnswerStream",),
    "owl2.runtime.fit.plan": ("Plan", "plan"),
    "owl2.runtime.generate": ("Answer", "Chunk", "FinishReason", "Stats"),
    "owl2.runtime.image_files": ("ImageRecord",),
    "owl2.runtime.owl": ("Owl2",),
    "owl2.runtime.preprocess": ("ImageReading",),
    "owl2.runtime.sampling": ("GenerationConfig",),
    "owl2.runtime.verification": ("LoadProgress",),
    "owl2.runtime.version": ("__version__",),
    "owl2.runtime.evaluation.evaluate": ("Evaluation", "EvaluationProgress", "evaluate"),
    "owl2.runtime.evaluation.verify": ("Verdict", "verify"),
    "owl2.runtime.errors": (
        "BackendError",
        "BackendUnavailableError",
        "BundleCorruptError",
        "BundleError",
        "BundleVersionError",
        "BusyError",
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "ContextOverflowError",
        "DataError",
        "ExportError",
        "ImageError",
        "InsufficientMemoryError",
        "Owl2Error",
        "Owl2Warning",
        "ParityError",
        "PromptError",
        "QuantizationError",
        "ReferenceModelError",
        "SavedChatError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - one list of names is enough


def __getattr__(name: str) -> object:
    if name in ("export", "quant", "runtime"):
        return import_module(f"owl2.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'owl2' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
