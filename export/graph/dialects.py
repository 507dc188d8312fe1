"""The dialects by the name that manifests give them."""

from __future__ import annotations

from owl2.export.graph import onnx_dialect, ort_dialect
from owl2.export.graph.dialect import Dialect
from owl2.runtime.spec import DialectName

DIALECTS: dict[DialectName, Dialect] = {"ort": ort_dialect.OrtDialect(), "onnx": onnx_dialect.OnnxDialect()}
MINIMUM_ONNXRUNTIME: dict[DialectName, str] = {
    "ort": ort_dialect.MINIMUM_ONNXRUNTIME,
    "onnx": onnx_dialect.MINIMUM_ONNXRUNTIME,
}
"""The lowest ONNX Runtime that has every operator of a dialect."""
