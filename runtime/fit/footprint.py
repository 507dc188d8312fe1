"""What running a bundle on a device takes: memory by its parts, what stands in the way, and a ceiling on the speed.

Everything is computed from the manifest alone: shapes, how weights are stored, sizes of files. Where figures come from:

* *computed*: shapes and file sizes decide it.
* *measured*: with the CPU provider of ONNX Runtime 1.32 on x86-64 and random layers of the 7B shapes, as memory of the
  process's own (RssAnon). Integer weights lie in memory once, repacked, with a float32 sum more per group than in the
  file; the mapped pages of the file are dropped. float16 weights are held in float32. What a prefill and an image took
  once stays in the runtime's arena: a step leaves one tensor of the feed-forward width per layer there, and all of it
  twice, for the runtime plans memory anew when it sees a shape again (1 to 10 layers, within 15 %).
* *assumed*: about GPUs, on none of which this project has run yet, and what a system keeps for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from owl2.runtime import spec
from owl2.runtime.bundle import Manifest, WeightFormat
from owl2.runtime.config import DecoderConfig, ModelConfig, require
from owl2.runtime.engine import PREFILL_BLOCK
from owl2.runtime.fit.machine import DetectedDevice, Memory
from owl2.runtime.fit.products import GIB, Product
from owl2.runtime.images import CACHED_IMAGES
from owl2.runtime.kv_cache import GROWTH
from owl2.runtime.placement import EngineKind
from owl2.runtime.spec import DialectName, FloatType, KvType

Basis = Literal["computed", "measured", "assumed"]
Runner = Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]

MIB = 1 << 20
FOR_CUDA = "--activations fp16 --vision fp16"
"""Options of ``owl2-export`` for ONNX Runtime on a GPU."""

# Measured; see above.
CPU_RUNTIME = 90 * MIB  # Python, numpy, ONNX Runtime, the tokenizer and two sessions: half of it code
VISION_FLOAT16 = 2.25  # resident bytes per stored byte; the decoder's matrices take exactly 2
ARENA = 2.0
VISION_ARENA = 1.5

# Assumed.
CUDA_CONTEXT = 400 * MIB  # on the GPU: context, kernels, cuBLAS
CUDA_LIBRARIES = 500 * MIB  # beside it, where the CPU has the same memory
# One int4 engine of 7B shapes was built, with TensorRT for RTX 1.7: 4.14 GiB of 3.87 GiB of weights, of which the head
# in float16 has 0.24; the process took 16.2 GiB at the peak, for prefills of 1024 and a context of 2048. In a small
# engine of float16 throughout 10.35 MB of weights took 27.99 MB.
ENGINE_PER_FILE = 1.01
ENGINE_PROFILES = 2  # of the decoder; each has floating-point matrices of its own, integer ones lie there once
BUILD_PER_ENGINE = 3.9
JETSON_SYSTEM = int(1.1 * GIB)  # firmware, kernel, services
JETSON_DESKTOP = int(0.8 * GIB)
GEFORCE_DRIVER = int(0.3 * GIB)
GEFORCE_DESKTOP = int(0.5 * GIB)
DATACENTER_RESERVED = 0.065  # error correction and driver, of the nominal memory


@dataclass(frozen=True, slots=True)
class BundleSizes:
    """What a plan reads of a manifest.

    Attributes:
        model, weights, dialect: as there.
        activations: fp32 or fp16, in which the graphs compute.
        kv_caches: types of the K/V cache to choose from.
        decoder, vision: bytes of the two graphs' weights.
    """

    model: ModelConfig
    weights: WeightFormat
    dialect: DialectName
    activations: FloatType
    kv_caches: tuple[KvType, ...]
    decoder: int
    vision: int

    @classmethod
    def of(cls, manifest: Manifest) -> BundleSizes:
        """Read it; a graph without external data counts as 0 bytes."""
        sizes = {name: entry.size for name, entry in manifest.files.items()}
        decoder, vision = (sizes.get(f"{graph}.data", 0) for graph in (spec.DECODER_GRAPH, spec.VISION_GRAPH))
        kinds = tuple(manifest.kv_cache)
        return cls(manifest.model, manifest.weights, manifest.dialect, manifest.activations, kinds, decoder, vision)


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """A device with the memory that a model may take there.

    Attributes:
        device: what it is.
        available: bytes; found on this machine, or assumed for one of the table.
        closable: bytes more if the desktop, and on this machine other programs, were closed; at most.
        host: bytes available in the CPU's memory, where engines are built; None where it is not known.
        here: whether it is this machine.
    """

    device: Product
    available: int
    closable: int
    host: int | None
    here: bool

    @classmethod
    def of_table(cls, device: Product) -> MemoryBudget:
        """A device of the table with its system and a desktop running, except that data-centre GPUs have none."""
        if device.family == "datacenter":
            return cls(device, int(device.memory * (1 - DATACENTER_RESERVED)), 0, None, here=False)
        system = JETSON_SYSTEM if device.shared else GEFORCE_DRIVER
        desktop = JETSON_DESKTOP if device.shared else GEFORCE_DESKTOP
        available = device.memory - system - desktop
        return cls(device, available, desktop, available if device.shared else None, here=False)

    @classmethod
    def of_machine(cls, found: DetectedDevice, host: Memory | None) -> MemoryBudget:
        """A device of this machine and the memory of its CPU."""
        device = found.device
        limited = device.shared and host is not None and host.limited
        system = JETSON_SYSTEM if device.shared else GEFORCE_DRIVER
        closable = 0 if limited else max(0, device.memory - system - found.available)
        return cls(device, found.available, closable, None if host is None else host.available, here=True)


@dataclass(frozen=True, slots=True)
class Settings:
    """How the bundle is to be run.

    Attributes:
        context: positions of a conversation.
        kv_cache: type of keys and values: fp32, fp16 or int8, also where the bundle does not offer it.
        images: in that conversation.
    """

    context: int
    kv_cache: KvType
    images: int = 1


@dataclass(frozen=True, slots=True)
class Scenario:
    """A bundle, a device, and how it is run there."""

    bundle: BundleSizes
    target: MemoryBudget
    settings: Settings


@dataclass(frozen=True, slots=True)
class Part:
    """Memory for one purpose, bytes.

    Attributes:
        name: what it is.
        size: estimate of the most it takes.
        least: what it takes in any case once the context is full; refusing to load goes by this one, with the whole
            context only where the user asked for that.
        basis: where ``size`` comes from.
    """

    name: str
    size: int
    least: int
    basis: Basis


@dataclass(frozen=True, slots=True)
class Building:
    """Building the decoder's engine.

    Attributes:
        kind: of engine.
        needed: bytes of the CPU's memory, an estimate.
        available: bytes there; None where it is not known.
    """

    kind: EngineKind
    needed: int
    available: int | None

    @property
    def fits(self) -> bool | None:
        """None where it is not known."""
        return None if self.available is None else self.needed <= self.available


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Decode cannot be faster than memory can be read.

    Attributes:
        weights: bytes that every token reads: the decoder's text branch and the head; neither the image branch's keys
            and values nor the token table.
        kv: bytes of keys and values it reads at the full context.
        bandwidth: bytes per second; None where it is not known.
    """

    weights: int
    kv: int
    bandwidth: float | None

    @property
    def full(self) -> float | None:
        """Tokens per second at the full context; None where the bandwidth is not known."""
        return None if self.bandwidth is None else self.bandwidth / (self.weights + self.kv)

    @property
    def empty(self) -> float | None:
        """Tokens per second at the start of a conversation."""
        return None if self.bandwidth is None else self.bandwidth / self.weights


def runner(scenario: Scenario) -> Runner:
    """What runs the bundle's graphs on the device: the dialect decides."""
    device = scenario.target.device
    if scenario.bundle.dialect == "ort" or not device.engines:
        return "onnxruntime-cpu" if device.family == "cpu" else "onnxruntime-cuda"
    return device.engines[0]


def problems(scenario: Scenario) -> tuple[str, ...]:
    """Why the bundle cannot run like this in any memory: a sentence each."""
    bundle, device, kind = scenario.bundle, scenario.target.device, scenario.settings.kv_cache
    found = []
    if bundle.dialect == "onnx" and not device.engines:
        found.append(
            f"graphs of the dialect onnx are for TensorRT, which {device.product} does not have; export with "
            "--dialect ort"
        )
    elif bundle.dialect == "onnx" and bundle.weights.decoder == "int4" and not device.int4_engines:
        found.append(
            f"TensorRT takes no int4 weights on {device.product} (SM{device.compute}); export with --dialect ort "
            "--activations fp16"
        )
    elif runner(scenario) == "onnxruntime-cuda" and (bundle.activations == "fp32" or bundle.weights.vision == "int8"):
        # No GroupQueryAttention in float32, no DynamicQuantizeMatMul: the load would be refused.
        found.append(
            "ONNX Runtime's CUDA provider lacks operators of this bundle, whose activations are fp32; export with "
            f"{FOR_CUDA}, or run it on the CPU"
        )
    if kind not in bundle.kv_caches:
        export = "--activations fp16" if kind == "fp16" else "--dialect ort"
        found.append(
            f"this bundle has no {kind} K/V cache, only {', '.join(bundle.kv_caches)}; export with {export} to have it"
        )
    return tuple(found)


def needed(scenario: Scenario) -> int:
    """Bytes of all parts."""
    return sum(part.size for part in parts(scenario))


def fits(scenario: Scenario) -> bool:
    """Whether it runs there."""
    return not problems(scenario) and needed(scenario) <= scenario.target.available


def parts(scenario: Scenario) -> tuple[Part, ...]:
    """Memory of the device that running takes; what takes none is left out."""
    return tuple(part for part in _parts(scenario) if part.size)


def _parts(scenario: Scenario) -> Iterator[Part]:
    bundle, settings, how = scenario.bundle, scenario.settings, runner(scenario)
    cpu, engine = how == "onnxruntime-cpu", how.startswith("tensorrt")
    known: Basis = "measured" if cpu and bundle.activations == "fp32" else "assumed"
    decoder, vision = _resident_decoder(scenario), _resident_vision(scenario)
    yield Part("decoder weights", decoder, bundle.decoder if engine else decoder, known)
    yield Part("vision weights", vision, vision, known)
    position = kv_bytes(bundle, settings.kv_cache)
    kv = settings.context * position
    yield Part("K/V cache", kv, kv, "computed")
    # A full buffer is copied into a longer one and let go of only then; of a new one on the CPU, what nothing was
    # written to takes no memory yet.
    old = max(0, settings.context - GROWTH) * position
    yield Part("K/V cache, growing", max(0, 2 * old - kv) if cpu else old, 0, "computed")
    stream, scores = _prefill_bytes(scenario)
    arena = 1 if engine else ARENA
    yield Part("prefill", int(arena * stream) + scores, scores, known)
    if settings.images:
        tower = _tower_bytes(scenario)
        yield Part("vision tower at work", int(tower * (1 if engine else VISION_ARENA)), tower, known)
        yield Part("images", _image_bytes(bundle.model, settings.images), 0, "computed")
    if cpu:
        # Is there already when a load is checked.
        yield Part("Python, ONNX Runtime", CPU_RUNTIME, 0, "measured")
    elif scenario.target.device.shared:
        yield Part("CUDA, Python, libraries", CUDA_CONTEXT + CPU_RUNTIME + CUDA_LIBRARIES, 0, "assumed")
    else:
        yield Part("CUDA context", CUDA_CONTEXT, 0, "assumed")


def kv_bytes(bundle: BundleSizes, kind: KvType) -> int:
    """Bytes that keys and values of one position take in all layers."""
    return spec.kv_bytes(bundle.model.decoder, kind, bundle.dialect)


def decoder_weights(config: DecoderConfig) -> tuple[int, int, int]:
    """How many weights of linear layers are the text's or shared, the image branch's, and the head's."""
    width, layers = config.hidden_size, config.num_hidden_layers
    text = layers * (4 * width**2 + 3 * width * config.intermediate_size)
    return text, layers * 2 * width**2, config.vocab_size * width


def decoder_bytes(bundle: BundleSizes, *, resident: bool) -> tuple[float, float, float]:
    """Bytes of the same three, as stored or as ONNX Runtime's CPU provider holds them."""
    counts, weights = decoder_weights(bundle.model.decoder), bundle.weights
    kinds = (weights.decoder, weights.decoder, weights.head)
    scale = _activation(bundle)
    text, image, head = (
        count * _bytes_per_weight(kind, weights.group_size, scale, resident=resident)
        for count, kind in zip(counts, kinds)
    )
    return text, image, head


def _bytes_per_weight(kind: str, group_size: int, scale: int, *, resident: bool) -> float:
    """With its share of a group's scale, and of the float32 sum that the CPU's kernel keeps for each group.

    Raises:
        ConfigError: the manifest names a kind that is not known.
    """
    require(kind in spec.BYTES_PER_VALUE, f"weights {kind!r} are not known; known: {', '.join(spec.BYTES_PER_VALUE)}")
    if kind.startswith("fp"):
        return 4.0 if resident else spec.BYTES_PER_VALUE[kind]
    per_group = scale + (4 if resident else 0)
    return spec.BYTES_PER_VALUE[kind] + (per_group / group_size if group_size > 0 else 0)


def vision_weights(model: ModelConfig) -> int:
    """Weights of the tower's and the abstractor's linear layers."""
    tower, queries = model.vision, model.abstractor
    block = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    cross = 4 * queries.hidden_size**2 + 3 * queries.hidden_size * queries.intermediate_size
    last = queries.hidden_size * model.decoder.hidden_size
    return tower.num_hidden_layers * block + queries.num_hidden_layers * cross + last


def _resident_decoder(scenario: Scenario) -> int:
    bundle, how = scenario.bundle, runner(scenario)
    if how == "onnxruntime-cpu":
        growth = sum(decoder_bytes(bundle, resident=True)) / sum(decoder_bytes(bundle, resident=False))
        return int(bundle.decoder * growth)
    return _engine_bytes(bundle) if how.startswith("tensorrt") else bundle.decoder


def _engine_bytes(bundle: BundleSizes) -> int:
    """The decoder's engine: integer matrices once, floating-point ones once per profile."""
    matrices = decoder_bytes(bundle, resident=False)
    kinds = (bundle.weights.decoder, bundle.weights.decoder, bundle.weights.head)
    floating = sum(size for size, kind in zip(matrices, kinds) if kind.startswith("fp")) / sum(matrices)
    return int(bundle.decoder * ENGINE_PER_FILE * (1 + (ENGINE_PROFILES - 1) * floating))


def _resident_vision(scenario: Scenario) -> int:
    halves = scenario.bundle.weights.vision == "fp16" and runner(scenario) == "onnxruntime-cpu"
    return int(scenario.bundle.vision * (VISION_FLOAT16 if halves else 1))


def _activation(bundle: BundleSizes) -> int:
    """Bytes of an element."""
    return int(spec.BYTES_PER_VALUE[bundle.activations])


def _prefill_bytes(scenario: Scenario) -> tuple[int, int]:
    """What one block of a prompt leaves: the stream and the feed-forward part, and attention's scores."""
    config, context = scenario.bundle.model.decoder, scenario.settings.context
    # Beyond the length that dynamic scaling leaves alone a prompt runs as one block.
    whole = config.steady_limit is not None and context > config.steady_limit
    rows = context if whole else min(PREFILL_BLOCK, context)
    per_layer = 0 if runner(scenario).startswith("tensorrt") else config.num_hidden_layers
    stream = rows * (4 * config.hidden_size + (2 + per_layer) * config.intermediate_size)
    scores = rows * context * config.num_attention_heads
    return stream * _activation(scenario.bundle), scores * _activation(scenario.bundle)


def _tower_bytes(scenario: Scenario) -> int:
    """The same of the vision tower, which sees one image at a time."""
    tower = scenario.bundle.model.vision
    rows = tower.num_tokens * (3 * tower.hidden_size + 2 * tower.intermediate_size)
    return (rows + tower.num_attention_heads * tower.num_tokens**2) * _activation(scenario.bundle)


def _image_bytes(model: ModelConfig, images: int) -> int:
    """Pixels of all images and rows of those that are remembered, both float32."""
    rows = min(images, CACHED_IMAGES) * model.rows_per_image * model.decoder.hidden_size
    return 4 * (images * 3 * model.vision.image_size**2 + rows)


def building(scenario: Scenario) -> Building | None:
    """What building the decoder's engine takes; None where none is needed or can be had."""
    device, bundle = scenario.target.device, scenario.bundle
    if bundle.dialect != "onnx" or not device.engines:
        return None
    return Building(device.engines[0], int(BUILD_PER_ENGINE * _engine_bytes(bundle)), scenario.target.host)


def ceiling(scenario: Scenario) -> Ceiling:
    """The limit that memory sets to the speed of decoding."""
    cpu = runner(scenario) == "onnxruntime-cpu"
    text, image, head = decoder_bytes(scenario.bundle, resident=cpu)
    # An engine reads the matrices of one profile.
    held = _resident_decoder(scenario) if cpu else scenario.bundle.decoder
    read = int(held * (text + head) / (text + image + head))
    kv = scenario.settings.context * kv_bytes(scenario.bundle, scenario.settings.kv_cache)
    return Ceiling(read, kv, scenario.target.device.bandwidth)
