"""The types in which an export stores weights and computes, given a few of its options.

The exporter follows these rules, and so does the planner, which says what another export would need.
"""

from __future__ import annotations

from dataclasses import dataclass

from owl2.runtime.config import require
from owl2.runtime.spec import FloatType, KvType, VisionType, WeightType


@dataclass(frozen=True, slots=True)
class StorageTypes:
    """Types of the numbers in a bundle.

    Attributes:
        decoder, head, vision, embeddings: of the weights, as in :class:`owl2.runtime.bundle.WeightFormat`.
        activations: in which the graphs compute.
        kv_cache: types of the K/V cache to choose from, that of the activations first.
    """

    decoder: WeightType
    head: WeightType
    vision: VisionType
    embeddings: FloatType
    activations: FloatType
    kv_cache: tuple[KvType, ...]


def storage_types(
    weights: WeightType,
    dialect: str = "ort",
    activations: FloatType | None = None,
    vision: VisionType | None = None,
) -> StorageTypes:
    """Resolve the defaults of an export.

    Args:
        weights: type of the decoder's linear layers.
        dialect: operators of the graphs.
        activations: None for fp32 in the dialect ort and with fp32 weights, fp16 in the dialect onnx.
        vision: type of the vision side's linear layers; None for int8 with integer weights (fp16 where the graph
            cannot compute with int8) and for the decoder's own type otherwise.

    Raises:
        ConfigError: a graph cannot compute with these types.
    """
    integer = weights in ("int4", "int8")
    if activations is None:
        activations = "fp32" if dialect == "ort" or weights == "fp32" else "fp16"
    # The kernels for int8 vision weights and for an int8 K/V cache are ONNX Runtime's, and take float32.
    int8_kernels = dialect == "ort" and activations == "fp32"
    if vision is None:
        vision = weights if weights in ("fp16", "fp32") else "int8" if int8_kernels else "fp16"
    types = f"weights {weights}, vision {vision}, activations {activations}"
    require(
        activations == "fp32" or "fp32" not in (weights, vision),
        f"fp32 weights need fp32 activations; got {types}",
    )
    require(
        activations == "fp32" or vision != "int8",
        f"an int8 vision side computes with fp32 activations; give --vision fp16; got {types}",
    )
    require(
        dialect == "ort" or "int8" not in (weights, vision),
        "the dialect onnx is for TensorRT, which does not take int8 weights as they are made here; use int4, fp16 "
        f"or fp32; got {types}",
    )
    return StorageTypes(
        decoder=weights,
        # Next to integer weights 4 bits would cost the most in the head. TensorRT does not take it in int8.
        head=weights if not integer else "int8" if dialect == "ort" else "fp16",
        vision=vision,
        embeddings="fp32" if weights == "fp32" else "fp16",
        activations=activations,
        kv_cache=("fp32", "int8") if int8_kernels else (activations,),
    )
