"""The dialects by the name that manifests give them."""

from __future__ import annotations

from owl2.export.graph import ort, standard
from owl2.export.graph.dialect import Dialect
from owl2.runtime.spec import DialectName

DIALECTS: dict[DialectName, Dialect] = {"ort": ort.OrtDialect(), "onnx": standard.StandardDialect()}
MINIMUM_ONNXRUNTIME: dict[DialectName, str] = {
    "ort": ort.MINIMUM_ONNXRUNTIME,
    "onnx": standard.MINIMUM_ONNXRUNTIME,
}
"""The lowest ONNX Runtime that has every operator of a dialect."""
