"""Whether a bundle fits a device, and what to change if it does not; the same check before a load.

Example::

    stored = Stored.of(read_manifest(Path("bundle/")))
    case = Case(stored, Target.of_table(find_device("orin-nx-16gb")), Settings(2048, "fp32"))
    plan = make_plan(case)
    print(plan.fits, plan.needed, [change.words for change in plan.changes])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from owl2.runtime.bundle import Manifest
from owl2.runtime.config import require
from owl2.runtime.devices import DEVICES, GIB, Device
from owl2.runtime.errors import InsufficientMemoryError
from owl2.runtime.footprint import (
    Building,
    Case,
    Ceiling,
    Part,
    Settings,
    Stored,
    Target,
    Way,
    building,
    ceiling,
    decoder_bytes,
    fits,
    kv_bytes,
    needed,
    parts,
    problems,
    vision_weights,
    way,
)
from owl2.runtime.machine import HERE, Places, free_swap, host_memory, this_cpu

SHORT_CHAT = 128
"""Positions beside the pictures below which no context is suggested."""
CONTEXT_STEP = 64
"""Suggested contexts are multiples of it."""
GROUP_SIZE = 128
"""Of integer weights that are suggested in place of floating point."""

Step = tuple[str, Case]
MakeStep = Callable[[Case], Step | None]


@dataclass(frozen=True, slots=True)
class Change:
    """Something that makes a case fit.

    Attributes:
        words: what to do, as a command line says it.
        case: what there is after it.
        needed: bytes that takes.
    """

    words: str
    case: Case
    needed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer for one case.

    Attributes:
        case: what was asked.
        way: what runs the graphs there.
        parts: of the memory needed.
        problems: a sentence each, why it cannot run like this however much memory there is.
        building: None where no engine is built.
        ceiling: on the speed of decoding.
        changes: each one makes it fit; empty if it fits as it is, or if nothing helps.
        elsewhere: the device with the least memory on which it fits as it is; None if it fits here, or nowhere.
    """

    case: Case
    way: Way
    parts: tuple[Part, ...]
    problems: tuple[str, ...]
    building: Building | None
    ceiling: Ceiling
    changes: tuple[Change, ...]
    elsewhere: Device | None

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether it runs there."""
        return not self.problems and self.needed <= self.case.target.available


def make_plan(case: Case) -> Plan:
    """Plan a case.

    Raises:
        ConfigError: the pictures leave no room for words.
    """
    settings, rows = case.settings, case.bundle.model.rows_per_image
    require(settings.pictures >= 0, f"pictures must not be negative, got {settings.pictures}")
    require(
        settings.pictures * rows < settings.context,
        f"{settings.pictures} pictures take {settings.pictures * rows} positions and leave none of the context of "
        f"{settings.context} for words; give at most {(settings.context - 1) // rows} pictures or a longer context",
    )
    fitting = fits(case)
    return Plan(
        case,
        way(case),
        parts(case),
        problems(case),
        building(case),
        ceiling(case),
        () if fitting else changes(case),
        None if fitting else _elsewhere(case),
    )


def check_memory(manifest: Manifest, context: int, kv_cache: str, *, places: Places = HERE) -> None:
    """Refuse to load on this machine's CPU what cannot fit, before the system kills the process for it.

    The estimate errs on the small side: weights, and keys and values of the whole context. Memory is what the kernel
    calls available (page cache that it can drop counts), less where a control group has a limit, and swap on a disk.
    A system that does not tell its memory is not checked.

    Raises:
        InsufficientMemoryError: with the figures and what would fit.
    """
    found = this_cpu(places)
    if found is None:
        return
    host = host_memory(places)
    case = Case(Stored.of(manifest), Target.of_machine(found, host), Settings(context, kv_cache, pictures=0))
    listed = [part for part in parts(case) if part.least]
    wanted, available = sum(part.least for part in listed), found.available + free_swap(places)
    if wanted > available:
        details = [f"{part.name} {_gib(part.least)}" for part in listed]
        found_changes = [change.words for change in changes(case)]
        raise InsufficientMemoryError(wanted, available, details, found_changes or [_nothing_helps(case)])


def _nothing_helps(case: Case) -> str:
    device = _elsewhere(case)
    return f"a machine with more memory ({device.product} would do)" if device else "a smaller model"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def changes(case: Case) -> tuple[Change, ...]:
    """What makes a case fit.

    Every step that does it alone; where none does but a shorter context, several as one before that: first without,
    then with exporting again.
    """
    alone = [step for make in STEPS[:-1] if (step := make(case)) is not None and fits(step[1])]
    last = _shorter_context(case)
    shorter = [last] if last is not None and fits(last[1]) else []
    together = [] if alone else [step for steps in (RUN_STEPS, STEPS) if (step := _together(case, steps)) is not None]
    found = [*alone, *together, *shorter]
    return tuple(Change(words, changed, needed(changed)) for words, changed in dict(found).items())


def _together(case: Case, steps: Sequence[MakeStep]) -> Step | None:
    """As many steps as it takes as one; None if all of them do not do it."""
    words = []
    for make in steps:
        step = make(case)
        if step is not None and not problems(step[1]):
            words.append(step[0])
            case = step[1]
            if fits(case):
                return " and ".join(words), case
    return None


def _close_programs(case: Case) -> Step | None:
    target = case.target
    if not target.closable:
        return None
    what = "other programs and the desktop" if target.here else "the desktop"
    freed = replace(target, available=target.available + target.closable, closable=0)
    return f"close {what} (up to {_gib(target.closable)})", replace(case, target=freed)


def _other_dialect(case: Case) -> Step | None:
    """The graphs of ONNX Runtime, where TensorRT cannot be had or not with these weights."""
    bundle, device = case.bundle, case.target.device
    if bundle.dialect != "onnx" or not problems(case):
        return None
    activations = "fp32" if device.family == "cpu" else "fp16"
    exported = replace(bundle, dialect="ort", activations=activations, kv_caches=(activations, "int8"))
    kind = case.settings.kv_cache
    settings = replace(case.settings, kv_cache=kind if kind == "int8" else activations)
    words = f"export with --dialect ort --activations {activations}"
    return words, replace(case, bundle=exported, settings=settings)


def _half_activations(case: Case) -> Step | None:
    """float16 throughout, on GPUs, which are fast in it."""
    bundle, settings = case.bundle, case.settings
    if way(case) != "onnxruntime-cuda" or bundle.activations != "fp32":
        return None
    kinds = tuple("fp16" if kind == "fp32" else kind for kind in bundle.kv_caches)
    kind = "fp16" if settings.kv_cache == "fp32" else settings.kv_cache
    exported = replace(bundle, activations="fp16", kv_caches=kinds)
    changed = replace(case, bundle=exported, settings=replace(settings, kv_cache=kind))
    return "export with --activations fp16", changed


def _int8_cache(case: Case) -> Step | None:
    offered = "int8" in case.bundle.kv_caches
    if not offered or kv_bytes(case.bundle, "int8") >= kv_bytes(case.bundle, case.settings.kv_cache):
        return None
    return "--kv-cache int8", replace(case, settings=replace(case.settings, kv_cache="int8"))


def _int8_vision(case: Case) -> Step | None:
    bundle = case.bundle
    if bundle.dialect != "ort" or not bundle.weights.vision.startswith("fp"):
        return None
    saved = vision_weights(bundle.model) * (int(bundle.weights.vision[2:]) // 8 - 1)
    weights = replace(bundle.weights, vision="int8")
    exported = replace(bundle, weights=weights, vision=max(0, bundle.vision - saved))
    return "export with --vision int8", replace(case, bundle=exported)


def _fewer_bits(case: Case) -> Step | None:
    """int4 layers, with the int8 head that they are exported with."""
    bundle = case.bundle
    if bundle.weights.decoder == "int4" or (bundle.dialect == "onnx" and not case.target.device.int4_engines):
        return None
    weights = replace(bundle.weights, decoder="int4", head="int8", group_size=bundle.weights.group_size or GROUP_SIZE)
    exported = replace(bundle, weights=weights)
    ratio = sum(decoder_bytes(exported, resident=False)) / sum(decoder_bytes(bundle, resident=False))
    return "export with --weights int4", replace(case, bundle=replace(exported, decoder=int(bundle.decoder * ratio)))


def _shorter_context(case: Case) -> Step | None:
    """The longest context that fits, in steps; None if not even a short conversation does."""
    settings = case.settings

    def at(steps: int) -> Case:
        return replace(case, settings=replace(settings, context=steps * CONTEXT_STEP))

    least = settings.pictures * case.bundle.model.rows_per_image + SHORT_CHAT
    low, high = -(-least // CONTEXT_STEP), (settings.context - 1) // CONTEXT_STEP
    if low > high or not fits(at(low)):
        return None
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if fits(at(middle)) else (low, middle - 1)
    return f"--context {low * CONTEXT_STEP}", at(low)


STEPS: tuple[MakeStep, ...] = (
    _other_dialect,
    _close_programs,
    _half_activations,
    _int8_cache,
    _int8_vision,
    _fewer_bits,
    _shorter_context,
)
"""What may be changed, the least loss first; each answers None where there is nothing to change."""
RUN_STEPS: tuple[MakeStep, ...] = (_close_programs, _int8_cache, _shorter_context)
"""Of these, what needs no new export."""


def _elsewhere(case: Case) -> Device | None:
    """The device with the least memory that takes the case as it is; one with shared memory for one with such."""
    shared = case.target.device.shared
    fitting = [device for device in DEVICES.values() if fits(replace(case, target=Target.of_table(device)))]
    return min(fitting, key=lambda device: (device.shared != shared, device.memory), default=None)
