"""Reading checkpoints in the GPTQ layout, and bundles made of them, without the code under test."""

from pathlib import Path
from typing import Any

import onnx
import reference
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def bundle_weight(bundle: Path, name: str, width: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Codes [N, K], scales [N, G] and packed zero points of a linear layer in the decoder graph."""
    model = onnx.load(bundle / "decoder.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    packed, scales = (numpy_helper.to_array(stored[f"{name}.{part}"]) for part in ("codes", "scales"))
    zeros = stored.get(f"{name}.zero_points")
    return (
        reference.unpack_nbits(packed, 4, width),
        scales,
        None if zeros is None else numpy_helper.to_array(zeros),
    )
