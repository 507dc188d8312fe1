"""Whether the native core can run a bundle here."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

from owl2.runtime.bundle import Manifest
from owl2.runtime.errors import BackendUnavailableError
from owl2.runtime.spec import KvType

MODULE = "owl2.runtime._native"
GROUP_SIZES = (32, 64, 128)
WIDEST_HEAD = 512
NOT_INSTALLED = "this installation has no native core (it was built without a compiler)"
BLOCK = 512
"""New positions of a prefill step."""
KV_TYPES: tuple[KvType, ...] = ("fp32", "fp16", "int8")
"""Types of K/V cache that it offers on every bundle."""


@cache
def is_installed() -> bool:
    """Whether this installation has the compiled module."""
    return importlib.util.find_spec(MODULE) is not None


def native_kernels() -> str | None:
    """The instruction set whose kernels the native core uses; None without the core.

    Raises:
        BackendUnavailableError: the environment variable OWL2_CPU names one that this processor does not have.
    """
    if not is_installed():
        return None
    from owl2.runtime import _native

    try:
        return _native.kernels()
    except ValueError as error:
        raise BackendUnavailableError(f"{error}; set OWL2_CPU to one of these, or not at all") from error


def obstacle(manifest: Manifest) -> str | None:
    """Why the native core cannot run a bundle, in a sentence without an end; None if it can."""
    weights, head_dim = manifest.weights, manifest.model.decoder.head_dim
    grouped = weights.group_size != 0
    obstacles = {
        NOT_INSTALLED: not is_installed(),
        f"the native core has no graphs of the dialect {manifest.dialect}": manifest.dialect != "ort",
        f"the native core computes in fp32, and the activations of this bundle are {manifest.activations}": (
            manifest.activations != "fp32"
        ),
        f"the native core has no groups of {weights.group_size} columns": (
            grouped and weights.group_size not in GROUP_SIZES
        ),
        f"the native core has no heads of {head_dim} values": head_dim > WIDEST_HEAD,
    }
    return next((sentence for sentence, applies in obstacles.items() if applies), None)


def reason_against(manifest: Manifest) -> str | None:
    """Why ONNX Runtime is the better choice for a bundle, as :func:`obstacle`: it may also be the faster one."""
    problem = obstacle(manifest)
    if problem is None and native_kernels() == "scalar" and os.environ.get("OWL2_CPU") != "scalar":
        return "the native core has no fast kernels for this processor"
    return problem


def default_kv_type(manifest: Manifest) -> KvType:
    """float16, which integer weights do not notice; float32 where the weights are in floating point."""
    return "fp16" if manifest.weights.decoder.startswith("int") else "fp32"
