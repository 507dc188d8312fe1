"""Which backend runs a bundle."""

from pathlib import Path

import pytest

from owl2 import Owl2
from owl2.runtime.backends.choose import find_backend
from owl2.runtime.backends.ort.engine import prepare as prepare_ort
from owl2.runtime.backends.tensorrt.engine import prepare as prepare_tensorrt
from owl2.runtime.placement import Placement
from owl2.runtime.spec import DialectName


@pytest.mark.parametrize(
    ("kind", "dialect", "native"),
    [
        ("cpu", "ort", False),
        ("cpu", "onnx", False),
        ("cuda", "ort", False),
        ("cuda", "onnx", False),
        ("tensorrt", "ort", True),
        ("tensorrt", "onnx", True),
        ("tensorrt-rtx", "ort", False),
        ("tensorrt-rtx", "onnx", True),
    ],
)
def test_onnx_runtime_runs_graphs_and_tensorrt_engines(kind: str, dialect: DialectName, native: bool) -> None:
    """On the device tensorrt the backend itself says that it takes only the dialect onnx."""
    assert find_backend(Placement(kind), dialect) is (prepare_tensorrt if native else prepare_ort)


def test_only_the_model_limits_the_context_of_graphs(bundle_a2_onnx: Path) -> None:
    owl = Owl2.load(bundle_a2_onnx)
    assert owl.context == owl.config.decoder.max_position_embeddings
