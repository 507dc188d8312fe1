"""Whether a bundle fits a device, and what to change if it does not; the same check before a load."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from owl2.runtime import spec
from owl2.runtime.arguments import checked
from owl2.runtime.backends.choose import resolve_options
from owl2.runtime.bundle import Manifest, WeightFormat, read_manifest
from owl2.runtime.config import require, resolve_context
from owl2.runtime.engine import BackendName, EngineOptions
from owl2.runtime.errors import BackendUnavailableError, InsufficientMemoryError
from owl2.runtime.fit import footprint
from owl2.runtime.fit.footprint import MemoryPart, Runner
from owl2.runtime.fit.machine import MemoryBudget, free_swap, gpus, read_bandwidth, this_cpu
from owl2.runtime.fit.products import GIB, PRODUCTS
from owl2.runtime.fit.storage import storage_types
from owl2.runtime.foreign import shorten
from owl2.runtime.kv_cache import GROWTH
from owl2.runtime.memory import ROOT
from owl2.runtime.placement import HOST, KINDS, Placement
from owl2.runtime.spec import BYTES_PER_VALUE, DialectName, FloatType, KvType, WeightType
from owl2.runtime.verification import FileEntry

THIS, GPU, CPU = "this", "gpu", "cpu"
"""Devices of this machine by name; ``this`` is its GPU, or its CPU without one."""
SHORT_CHAT = 128
"""Positions in addition to the images below which no context is suggested."""
CONTEXT_STEP = 64
"""Suggested contexts are multiples of it."""
GROUP_SIZE = 128
"""Of integer weights that are suggested in place of floating point."""


@dataclass(frozen=True, repr=False)
class Plan:
    """Running a bundle on a device: memory, speed, and what to change; ``print(plan)`` gives a summary.

    Attributes:
        budget: the device and its memory.
        context: positions of a conversation.
        images: in that conversation.
        bundle: folder, for people.
        notes: on the choice of the device, a sentence each.
        backend: of a CPU; None for the usual one.
    """

    manifest: Manifest
    budget: MemoryBudget
    context: int
    kv_type: KvType
    images: int = 1
    bundle: str = "bundle"
    notes: tuple[str, ...] = ()
    backend: BackendName | None = None

    @property
    def runner(self) -> Runner:
        return footprint.find_runner(self.manifest, self.budget.device, self.backend)

    @cached_property
    def parts(self) -> list[MemoryPart]:
        """Memory needed on the device, by purpose."""
        device, runner = self.budget.device, self.runner
        return footprint.memory_parts(self.manifest, device, runner, self.context, self.kv_type, self.images)

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def available(self) -> int:
        """Bytes that a model may take on the device."""
        return self.budget.available

    @property
    def problem(self) -> str | None:
        """Why the bundle cannot run on the device, however much memory it has, and what to do; None if it can."""
        manifest, device = self.manifest, self.budget.device
        export, _ = exported(self, manifest.weights.decoder)
        if manifest.dialect == "onnx" and not device.engines:
            return f"graphs of the dialect onnx are for TensorRT, which {device.product} does not have; {export}"
        if manifest.dialect == "onnx" and manifest.weights.decoder == "int4" and not device.int4_engines:
            return f"TensorRT takes no int4 weights on {device.product} (SM{device.compute}); {export}"
        cuda = self.runner == "onnxruntime-cuda"
        if cuda and (manifest.activations == "fp32" or manifest.weights.vision == "int8"):
            # No GroupQueryAttention in float32, no DynamicQuantizeMatMul: the load would be refused.
            return (
                "ONNX Runtime's CUDA provider lacks operators of this bundle, whose activations are fp32; "
                f"{export}, or run it on the CPU"
            )
        return None

    @property
    def fits(self) -> bool:
        return self.problem is None and self.needed <= self.available

    @property
    def verdict(self) -> str:
        """``fits``, ``does not fit`` or ``cannot run``."""
        return "fits" if self.fits else "does not fit" if self.problem is None else "cannot run"

    @property
    def building(self) -> int | None:
        """Bytes of the CPU's memory that building the decoder's engine takes; None where none is built."""
        return footprint.build_bytes(self.manifest) if self.runner.startswith("tensorrt") else None

    @property
    def bytes_per_token(self) -> tuple[int, int]:
        """Bytes that every token reads: of weights, and of keys and values at the full context."""
        kv = self.context * footprint.kv_position(self.manifest, self.kv_type, self.runner)
        return footprint.weights_per_token(self.manifest, self.runner), kv

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Ceiling on the speed, bandwidth over bytes read: at the start of a conversation, and at its full context.

        None where the bandwidth is not known.
        """
        bandwidth, (weights, kv) = self.budget.device.bandwidth, self.bytes_per_token
        return None if bandwidth is None else (bandwidth / weights, bandwidth / (weights + kv))

    @cached_property
    def suggestions(self) -> dict[str, Plan]:
        """Changes that each make it fit, with the plan after it; empty if it fits already or nothing helps."""
        if self.fits:
            return {}
        found = run_changes(self)
        for weights in dict.fromkeys((self.manifest.weights.decoder, "int4")):
            options, after = exported(self, weights)
            if after.fits:
                found[options] = after
            elif self.problem or after.needed < self.needed:
                found |= {f"{options} and {change}": last for change, last in list(run_changes(after).items())[:1]}
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dictionaries: bytes, bytes per second, tokens per second."""
        (weights, kv), (start, full) = self.bytes_per_token, self.tokens_per_second or (None, None)
        built, host = self.building, self.budget.host
        enough = None if built is None or host is None else built <= host
        return {
            "fits": self.fits,
            "needed": self.needed,
            "available": self.available,
            "problem": self.problem,
            "runner": self.runner,
            "device": self.budget.device.to_json(),
            "settings": {"context": self.context, "kv_cache": self.kv_type, "images": self.images},
            "parts": [{"name": part.name, "size": part.size, "basis": part.basis} for part in self.parts],
            "building": None if built is None else {"needed": built, "available": host, "fits": enough},
            "ceiling": {
                "weight_bytes_per_token": weights,
                "kv_bytes_per_token": kv,
                "tokens_per_second": full,
                "tokens_per_second_empty": start,
            },
            "suggestions": [
                {"change": change, "needed": plan.needed, "available": plan.available}
                for change, plan in self.suggestions.items()
            ],
        }

    def __str__(self) -> str:
        figures = f"{gib(self.needed)} needed, {gib(self.available)} available"
        lines = [f"{self.bundle} on {self.budget.device.product}: {self.verdict}, {figures}"]
        lines += [self.problem] if self.problem else []
        return "\n  ".join(lines + [f"to make it fit: {change}" for change in self.suggestions])

    def __repr__(self) -> str:
        return f"<Plan {str(self).splitlines()[0]}>"


@checked
def plan(
    bundle: str | os.PathLike[str],
    *,
    device: str | None = None,
    context: int | None = None,
    kv_cache: KvType | None = None,
    images: int = 1,
    backend: BackendName | None = None,
) -> Plan:
    """Estimate memory and speed of a bundle on a device, this one or another.

    Nothing is loaded: of the bundle only ``owl2.json`` is read.

    Example::

        plan = owl2.plan("bundle/", device="orin-nx-16gb")
        print(plan.fits, plan.needed, list(plan.suggestions))

    Args:
        bundle: folder written by ``owl2-export``.
        device: a product such as ``orin-nx-16gb`` (``owl2 plan --list`` shows all), or ``gpu`` or ``cpu`` of this
            machine with the memory that is free now; None or ``this`` for its GPU, or its CPU without one.
        context: positions of a conversation; None for the model's own limit.
        kv_cache: type of keys and values; None for the one that a load chooses.
        images: in the conversation.
        backend: of a CPU: ``"native"`` or ``"onnxruntime"``; None for the one that a load chooses.

    Raises:
        BundleError: the folder is not a bundle.
        ConfigError: a device that is not known, or a setting that cannot work.
        BackendUnavailableError: this machine has no GPU, or its memory is not known.
    """
    manifest = read_manifest(Path(bundle))
    context = resolve_context(manifest.model.decoder, context)
    rows = manifest.model.rows_per_image
    require(images >= 0, f"images must not be negative, got {images}")
    require(
        images * rows < context,
        f"{images} images take {images * rows} positions and leave none of the context of {context} for text; give at "
        f"most {(context - 1) // rows} images or a longer context",
    )
    budget, notes = find_budget(device or THIS)
    native = footprint.find_runner(manifest, budget.device, backend) == "native"
    options = EngineOptions(kv_cache=kv_cache, backend=backend)
    kv_type = resolve_options(manifest, options).kv_cache if native else manifest.kv_type(kv_cache)
    return Plan(manifest, budget, context, kv_type or manifest.activations, images, str(bundle), notes, backend)


def find_budget(name: str) -> tuple[MemoryBudget, tuple[str, ...]]:
    """The memory of a device, and notes on its choice; raises as :func:`plan`."""
    if name in PRODUCTS:
        return MemoryBudget.of_product(PRODUCTS[name]), ()
    known = (THIS, GPU, CPU, *PRODUCTS)
    require(name in known, f"device {shorten(name)} is not known; known: {', '.join(known)}")
    found = [] if name == CPU else gpus()
    if found:
        several = f"{len(found)} GPUs are found; planning for number 0, {found[0].device.product}"
        return found[0], (several,) if len(found) > 1 else ()
    none = "no GPU is found (no Jetson's device tree, no answer from nvidia-smi)"
    cpu = this_cpu()
    if name == GPU or cpu is None:
        reason = none if name == GPU else "the memory of this system is not known (no /proc/meminfo)"
        raise BackendUnavailableError(f"{reason}; name a product of owl2 plan --list")
    measured = replace(cpu.device, bandwidth=read_bandwidth())
    return replace(cpu, device=measured), () if name == CPU else (f"{none}; planning for the CPU",)


def check_memory(
    manifest: Manifest,
    context: int | None,
    kv_type: KvType,
    device: Placement = HOST,
    *,
    backend: BackendName | None = None,
    root: Path = ROOT,
) -> None:
    """Refuse to load a model that cannot fit, before the system kills the process for it.

    The estimate errs on the small side: weights, and keys and values of the first positions, or of a context that was
    asked for (with None, a conversation may never reach the model's own limit). It is compared with what is available
    on the CPU (with swap on a disk) or the Jetson, or free on the GPU that has the most: which of several an index
    means is up to CUDA. Devices of other packages, and those whose memory is not known, are not checked.

    Raises:
        InsufficientMemoryError: with the figures and what would fit.
    """
    if device.kind not in KINDS:
        return
    budget = this_cpu(root) if device.on_host else max(gpus(root), key=lambda gpu: gpu.available, default=None)
    if budget is None:
        return
    full = Plan(manifest, budget, resolve_context(manifest.model.decoder, context), kv_type, images=0, backend=backend)
    first = full if context is not None else replace(full, context=min(full.context, GROWTH))
    least = {part.name: part.least for part in first.parts if part.least}
    needed, available = sum(least.values()), budget.available + (free_swap(root) if device.on_host else 0)
    if needed > available:
        details = [f"{name} {gib(size)}" for name, size in least.items()]
        larger = f"a {'machine' if device.on_host else 'GPU'} with {gib(full.needed)} of memory available"
        command = "owl2 plan BUNDLE --device cpu" if device.on_host else "owl2 plan BUNDLE"
        raise InsufficientMemoryError(needed, available, details, list(full.suggestions) or [larger], command)


def run_changes(plan: Plan) -> dict[str, Plan]:
    """Changes without another export: each that suffices by itself, or else all together; a shorter context last."""
    steps: dict[str, dict[str, Any]] = {}
    if closable := plan.budget.closable:
        programs = "other programs and the desktop" if plan.budget.here else "the desktop"
        freed = replace(plan.budget, available=plan.available + closable)
        steps[f"close {programs} (up to {gib(closable)})"] = {"budget": freed}
    if plan.kv_type != "int8" and ("int8" in plan.manifest.kv_cache or plan.runner == "native"):
        steps["--kv-cache int8"] = {"kv_type": "int8"}
    found = {change: after for change, fields in steps.items() if (after := replace(plan, **fields)).fits}
    if steps and not found:
        together, change = plan, " and ".join(steps)
        for fields in steps.values():
            together = replace(together, **fields)
        if together.fits:
            found[change] = together
        else:
            found |= {f"{change} and {last}": after for last, after in shorter_context(together).items()}
    return found | shorter_context(plan)


def shorter_context(plan: Plan) -> dict[str, Plan]:
    """The longest context that fits, in steps; empty if not even a short conversation does."""
    least = plan.images * plan.manifest.model.rows_per_image + SHORT_CHAT
    contexts = range((plan.context - 1) // CONTEXT_STEP * CONTEXT_STEP, least - 1, -CONTEXT_STEP)
    plans = (replace(plan, context=context) for context in contexts)
    return next(({f"--context {shorter.context}": shorter} for shorter in plans if shorter.fits), {})


def exported(plan: Plan, weights: WeightType) -> tuple[str, Plan]:
    """Another export with weights of this type, in a form that the device runs: its options, and the plan after it."""
    old, device = plan.manifest, plan.budget.device
    engines = device.int4_engines if weights == "int4" else bool(device.engines)
    dialect: DialectName = "onnx" if old.dialect == "onnx" and engines else "ort"
    activations: FloatType = "fp16"
    if device.family == "cpu":
        activations = old.activations if dialect == old.dialect else "fp32"
    elif weights == "fp32":
        weights = "fp16"
    stored = storage_types(weights, dialect, activations)
    group_size = (old.weights.group_size or GROUP_SIZE) if weights.startswith("int") else 0
    types = WeightFormat(weights, stored.head, stored.vision, stored.embeddings, old.weights.method, group_size)
    kv_cache = dict.fromkeys(stored.kv_cache, "")
    new = replace(old, dialect=dialect, activations=activations, kv_cache=kv_cache, weights=types)
    ratios = {
        spec.DECODER_GRAPH: sum(footprint.decoder_bytes(new)) / sum(footprint.decoder_bytes(old)),
        spec.VISION_GRAPH: BYTES_PER_VALUE[stored.vision] / BYTES_PER_VALUE[old.weights.vision],
    }
    files = {
        f"{graph}.data": FileEntry(int(footprint.stored(old, graph) * ratio), "") for graph, ratio in ratios.items()
    }
    kv_type = plan.kv_type if plan.kv_type in stored.kv_cache or plan.runner == "native" else activations
    after = replace(plan, manifest=replace(new, files={**old.files, **files}), kv_type=kv_type)
    return f"export with --dialect {dialect} --weights {weights} --activations {activations}", after


def gib(count: int) -> str:
    """Bytes for people, in GiB."""
    return f"{count / GIB:.2f} GiB"
