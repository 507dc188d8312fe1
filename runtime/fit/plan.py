"""Whether a bundle fits a device, and what to change if it does not; the same check before a load.

Example::

    stored = BundleSizes.of(read_manifest(Path("bundle/")))
    scenario = Scenario(stored, MemoryBudget.of_table(find_product("orin-nx-16gb")), Settings(2048, "fp32"))
    plan = make_plan(scenario)
    print(plan.fits, plan.needed, [change.words for change in plan.changes])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from owl2.runtime.bundle import Manifest
from owl2.runtime.config import require, resolve_context
from owl2.runtime.errors import InsufficientMemoryError
from owl2.runtime.fit.footprint import (
    FOR_CUDA,
    Building,
    BundleSizes,
    Ceiling,
    MemoryBudget,
    Part,
    Runner,
    Scenario,
    Settings,
    building,
    ceiling,
    decoder_bytes,
    fits,
    kv_bytes,
    needed,
    parts,
    problems,
    runner,
    vision_weights,
)
from owl2.runtime.fit.machine import SYSTEM, SystemPaths, free_swap, gpus, host_memory, this_cpu
from owl2.runtime.fit.products import GIB, PRODUCTS, Product
from owl2.runtime.kv_cache import GROWTH
from owl2.runtime.placement import KINDS, Placement
from owl2.runtime.spec import BYTES_PER_VALUE, KvType

SHORT_CHAT = 128
"""Positions beside the images below which no context is suggested."""
CONTEXT_STEP = 64
"""Suggested contexts are multiples of it."""
GROUP_SIZE = 128
"""Of integer weights that are suggested in place of floating point."""

Step = tuple[str, Scenario]
MakeStep = Callable[[Scenario], Step | None]


@dataclass(frozen=True, slots=True)
class Change:
    """Something that makes a scenario fit.

    Attributes:
        words: what to do, as a command line says it.
        scenario: what there is after it.
        needed: bytes that takes.
    """

    words: str
    scenario: Scenario
    needed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer for one scenario.

    Attributes:
        scenario: what was asked.
        way: what runs the graphs there.
        parts: of the memory needed.
        problems: a sentence each, why it cannot run like this however much memory there is.
        building: None where no engine is built.
        ceiling: on the speed of decoding.
        changes: each one makes it fit; empty if it fits as it is, or if nothing helps.
        elsewhere: the device with the least memory on which it fits as it is; None if it fits here, or nowhere.
    """

    scenario: Scenario
    runner: Runner
    parts: tuple[Part, ...]
    problems: tuple[str, ...]
    building: Building | None
    ceiling: Ceiling
    changes: tuple[Change, ...]
    elsewhere: Product | None

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether it runs there."""
        return not self.problems and self.needed <= self.scenario.target.available


def make_plan(scenario: Scenario) -> Plan:
    """Plan a scenario.

    Raises:
        ConfigError: the images leave no room for words.
    """
    settings, rows = scenario.settings, scenario.bundle.model.rows_per_image
    require(settings.images >= 0, f"images must not be negative, got {settings.images}")
    require(
        settings.images * rows < settings.context,
        f"{settings.images} images take {settings.images * rows} positions and leave none of the context of "
        f"{settings.context} for words; give at most {(settings.context - 1) // rows} images or a longer context",
    )
    fitting = fits(scenario)
    return Plan(
        scenario,
        runner(scenario),
        parts(scenario),
        problems(scenario),
        building(scenario),
        ceiling(scenario),
        () if fitting else changes(scenario),
        None if fitting else _elsewhere(scenario),
    )


def check_memory(
    manifest: Manifest,
    context: int | None,
    kv_cache: KvType,
    device: Placement | None = None,
    *,
    paths: SystemPaths = SYSTEM,
) -> None:
    """Refuse to load on this machine what cannot fit, before the system kills the process for it.

    The estimate errs on the small side: weights, and the keys and values that the first positions take, or all of a
    context that was asked for. On the CPU and on a Jetson memory is what the kernel calls available (page cache that it
    can drop counts), less where a control group has a limit; on the CPU with swap on a disk. On another GPU it is what
    nvidia-smi calls free, of several GPUs on the one with the most, for which of them an index means is up to CUDA.
    What tells no memory is not checked, nor are kinds of device that other packages add.

    Args:
        manifest: of the bundle.
        context: positions that the user asked for; None for the model's own, which a conversation may never reach.
        kv_cache: type of keys and values.
        device: what shall run it; None for the CPU.
        paths: where Linux tells of memory.

    Raises:
        InsufficientMemoryError: with the figures and what would fit.
    """
    on_host = device is None or device.on_host
    found = this_cpu(paths) if on_host else max(gpus(paths), key=lambda gpu: gpu.available, default=None)
    if found is None or (device is not None and device.kind not in KINDS):
        return
    positions = resolve_context(manifest.model.decoder, context)
    target = MemoryBudget.of_machine(found, host_memory(paths))
    scenario = Scenario(BundleSizes.of(manifest), target, Settings(positions, kv_cache, images=0))
    first = min(positions, GROWTH) if context is None else positions
    listed = [
        part for part in parts(replace(scenario, settings=replace(scenario.settings, context=first))) if part.least
    ]
    wanted = sum(part.least for part in listed)
    available = found.available + (free_swap(paths) if on_host else 0)
    if wanted > available:
        details = [f"{part.name} {_gib(part.least)}" for part in listed]
        hints = [change.words for change in changes(scenario)] or [_nothing_helps(scenario)]
        command = "owl2 plan BUNDLE --device cpu" if on_host else "owl2 plan BUNDLE"
        raise InsufficientMemoryError(wanted, available, details, hints, command)


def _nothing_helps(scenario: Scenario) -> str:
    if scenario.target.device.family == "cpu":
        return f"a machine with {_gib(needed(scenario))} of memory available"
    device = _elsewhere(scenario)
    return f"a GPU with more memory ({device.product} would do)" if device else "a smaller model"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def changes(scenario: Scenario) -> tuple[Change, ...]:
    """What makes a scenario fit.

    Every step that does it alone; where none does but a shorter context, several as one before that: first without,
    then with exporting again.
    """
    alone = [step for make in STEPS[:-1] if (step := make(scenario)) is not None and fits(step[1])]
    last = _shorter_context(scenario)
    shorter = [last] if last is not None and fits(last[1]) else []
    together = (
        [] if alone else [step for steps in (RUN_STEPS, STEPS) if (step := _together(scenario, steps)) is not None]
    )
    found = [*alone, *together, *shorter]
    return tuple(Change(words, changed, needed(changed)) for words, changed in dict(found).items())


def _together(scenario: Scenario, steps: Sequence[MakeStep]) -> Step | None:
    """As many steps as it takes as one; None if all of them do not do it."""
    words = []
    for make in steps:
        step = make(scenario)
        if step is not None and not problems(step[1]) and _missing(step[1]) < _missing(scenario):
            words.append(step[0])
            scenario = step[1]
            if fits(scenario):
                return " and ".join(words), scenario
    return None


def _missing(scenario: Scenario) -> int:
    """Bytes short of what is needed; what cannot run at all lacks more than any memory."""
    return (1 << 62 if problems(scenario) else 0) + needed(scenario) - scenario.target.available


def _close_programs(scenario: Scenario) -> Step | None:
    target = scenario.target
    if not target.closable:
        return None
    what = "other programs and the desktop" if target.here else "the desktop"
    freed = replace(target, available=target.available + target.closable, closable=0)
    return f"close {what} (up to {_gib(target.closable)})", replace(scenario, target=freed)


def _exported(scenario: Scenario, options: str, **chosen: str) -> Step | None:
    """The scenario with its bundle exported again; what is not chosen is as ``owl2-export`` would have it.

    None if nothing changes by it, or if ``owl2-export`` would refuse it.

    Args:
        scenario: to be changed.
        options: of ``owl2-export``, for people.
        chosen: dialect, activations, weights or vision, as the options of that name.
    """
    old = scenario.bundle
    given: Any = {"dialect": old.dialect, "activations": old.activations, "weights": old.weights.decoder} | chosen
    dialect, activations, weights = given["dialect"], given["activations"], given["weights"]
    if (dialect == "onnx" and weights == "int8") or (activations == "fp16" and weights == "fp32"):
        return None
    integer, plain = weights.startswith("int"), (dialect, activations) == ("ort", "fp32")
    vision = given.get("vision") or ("int8" if plain else "fp16") if integer else given.get("vision", weights)
    head = ("int8" if dialect == "ort" else "fp16") if integer else weights
    group = (old.weights.group_size or GROUP_SIZE) if integer else 0
    kinds = replace(old.weights, decoder=weights, head=head, vision=vision, group_size=group)
    caches: tuple[KvType, ...] = ("fp32", "int8") if plain else (activations,)
    new = replace(old, weights=kinds, dialect=dialect, activations=activations, kv_caches=caches)
    ratio = sum(decoder_bytes(new, resident=False)) / sum(decoder_bytes(old, resident=False))
    more = vision_weights(old.model) * (BYTES_PER_VALUE[vision] - BYTES_PER_VALUE[old.weights.vision])
    new = replace(new, decoder=int(old.decoder * ratio), vision=max(0, int(old.vision + more)))
    settings = scenario.settings
    if settings.kv_cache not in caches:
        settings = replace(settings, kv_cache=activations)
    return None if new == old else (f"export with {options}", replace(scenario, bundle=new, settings=settings))


def _other_dialect(scenario: Scenario) -> Step | None:
    """The graphs of ONNX Runtime, where TensorRT cannot be had or not with these weights."""
    if scenario.bundle.dialect != "onnx" or not problems(scenario):
        return None
    half = scenario.target.device.family != "cpu" and scenario.bundle.weights.decoder != "fp32"
    activations = "fp16" if half else "fp32"
    return _exported(scenario, f"--dialect ort --activations {activations}", dialect="ort", activations=activations)


def _half_activations(scenario: Scenario) -> Step | None:
    """float16 throughout, without which CUDA does not take a bundle; an int8 vision side grows to float16 with it."""
    if runner(scenario) != "onnxruntime-cuda" or not problems(scenario):
        return None
    if scenario.bundle.weights.decoder == "fp32":
        return _exported(scenario, f"--weights fp16 {FOR_CUDA}", weights="fp16", activations="fp16", vision="fp16")
    return _exported(scenario, FOR_CUDA, activations="fp16", vision="fp16")


def _int8_cache(scenario: Scenario) -> Step | None:
    offered = "int8" in scenario.bundle.kv_caches
    if not offered or kv_bytes(scenario.bundle, "int8") >= kv_bytes(scenario.bundle, scenario.settings.kv_cache):
        return None
    return "--kv-cache int8", replace(scenario, settings=replace(scenario.settings, kv_cache="int8"))


def _int8_vision(scenario: Scenario) -> Step | None:
    bundle = scenario.bundle
    if (bundle.dialect, bundle.activations) != ("ort", "fp32") or not bundle.weights.vision.startswith("fp"):
        return None
    return _exported(scenario, "--vision int8", vision="int8")


def _fewer_bits(scenario: Scenario) -> Step | None:
    """int4 layers, with the head and the vision side that they are exported with."""
    bundle = scenario.bundle
    if bundle.weights.decoder == "int4" or (bundle.dialect == "onnx" and not scenario.target.device.int4_engines):
        return None
    return _exported(scenario, "--weights int4", weights="int4")


def _shorter_context(scenario: Scenario) -> Step | None:
    """The longest context that fits, in steps; None if not even a short conversation does."""
    settings = scenario.settings

    def at(steps: int) -> Scenario:
        return replace(scenario, settings=replace(settings, context=steps * CONTEXT_STEP))

    least = settings.images * scenario.bundle.model.rows_per_image + SHORT_CHAT
    low, high = -(-least // CONTEXT_STEP), (settings.context - 1) // CONTEXT_STEP
    if low > high or not fits(at(low)):
        return None
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if fits(at(middle)) else (low, middle - 1)
    return f"--context {low * CONTEXT_STEP}", at(low)


STEPS: tuple[MakeStep, ...] = (
    _other_dialect,
    _half_activations,
    _close_programs,
    _int8_cache,
    _int8_vision,
    _fewer_bits,
    _shorter_context,
)
"""What may be changed: what has to be first, then the least loss first; each answers None where nothing changes."""
RUN_STEPS: tuple[MakeStep, ...] = (_close_programs, _int8_cache, _shorter_context)
"""Of these, what needs no new export."""


def _elsewhere(scenario: Scenario) -> Product | None:
    """The device with the least memory that takes the scenario as it is; one with shared memory for one with such."""
    shared = scenario.target.device.shared
    fitting = [device for device in PRODUCTS.values() if fits(replace(scenario, target=MemoryBudget.of_table(device)))]
    return min(fitting, key=lambda device: (device.shared != shared, device.memory), default=None)
