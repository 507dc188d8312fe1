"""Export: from an official PyTorch checkpoint to a bundle.

Example::

    from owl2.export import ExportConfig, export_bundle

    report = export_bundle(ExportConfig(Path("mplug-owl2-llama2-7b/"), Path("owl2-int4/")))
    print(report.accuracy.kl_text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from owl2.runtime.version import __version__

if TYPE_CHECKING:
    from owl2.export.config import ExportConfig
    from owl2.export.gptq_checkpoint import export_gptq
    from owl2.export.pipeline import export_bundle
    from owl2.export.report import Report

__all__ = ["ExportConfig", "Report", "__version__", "export_bundle", "export_gptq"]

# Imported on first use: most of them need torch, which takes seconds.
_MODULES = {
    "ExportConfig": "owl2.export.config",
    "Report": "owl2.export.report",
    "export_bundle": "owl2.export.pipeline",
    "export_gptq": "owl2.export.gptq_checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
