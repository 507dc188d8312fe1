"""Memory that a bundle takes on a device, by purpose, and the bytes that every token reads.

Everything is computed from the manifest: shapes, types of weights, sizes of files. Where figures come from:

* *computed*: shapes and file sizes decide it.
* *measured*: with the CPU provider of ONNX Runtime 1.32 on x86-64 and random layers of the 7B shapes, as memory of the
  process's own (RssAnon). Integer weights are in memory once, repacked, with a float32 sum more per group than in the
  file; the mapped pages of the file are dropped. float16 weights are held in float32. Memory that a prefill or an image
  once took stays in the runtime's arena: a step leaves one tensor of the feed-forward width per layer there, and all of
  it twice, because the runtime plans memory anew when it sees a shape again (1 to 10 layers, within 15 %).
* *assumed*: about GPUs, on which this project has not run yet, and the memory that a system keeps for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from owl2.runtime import spec
from owl2.runtime.backends.native.support import BLOCK, reason_against
from owl2.runtime.bundle import Manifest
from owl2.runtime.config import DecoderConfig
from owl2.runtime.engine import PREFILL_BLOCK, BackendName
from owl2.runtime.fit.machine import MIB
from owl2.runtime.fit.products import Product
from owl2.runtime.images import CACHED_IMAGES
from owl2.runtime.kv_cache import GROWTH
from owl2.runtime.spec import BYTES_PER_VALUE, KvType, WeightType

Basis = Literal["computed", "measured", "assumed"]
Runner = Literal["native", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]

# Measured; see above.
CPU_RUNTIME = 90 * MIB  # Python, numpy, ONNX Runtime, the tokenizer and two sessions: half of it code
VISION_FLOAT16 = 2.25  # resident bytes per stored byte; the decoder's matrices take exactly 2
ARENA = 2.0
VISION_ARENA = 1.5

# Assumed.
CUDA_CONTEXT = 400 * MIB  # on the GPU: context, kernels, cuBLAS
CUDA_LIBRARIES = 500 * MIB  # in addition, where the CPU has the same memory
# One int4 engine of 7B shapes was built, with TensorRT for RTX 1.7: 4.14 GiB of 3.87 GiB of weights, of which the head
# in float16 has 0.24; the process took 16.2 GiB at the peak, for prefills of 1024 and a context of 2048. In a small
# engine of float16 throughout 10.35 MB of weights took 27.99 MB.
ENGINE_PER_FILE = 1.01
ENGINE_PROFILES = 2  # of the decoder; floating-point matrices are held once for each, integer ones once
BUILD_PER_ENGINE = 3.9
# The native core: bytes per row and inner value beside the floats (int8 copies, the gate).
NATIVE_SPARE = 2


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Memory for one purpose, bytes.

    Attributes:
        size: estimate of the most it takes.
        least: what it takes in any case once the context is full; a load is refused by this figure.
        basis: where ``size`` comes from.
    """

    name: str
    size: int
    least: int
    basis: Basis


def find_runner(manifest: Manifest, device: Product, backend: BackendName | None = None) -> Runner:
    """Choose what runs the bundle's graphs on the device; the dialect decides, and ``backend`` on the CPU."""
    if device.family == "cpu" and (backend == "native" or (backend is None and reason_against(manifest) is None)):
        return "native"
    if manifest.dialect == "ort" or not device.engines:
        return "onnxruntime-cpu" if device.family == "cpu" else "onnxruntime-cuda"
    return device.engines[0]


def memory_parts(
    manifest: Manifest, device: Product, runner: Runner, context: int, kv_type: KvType, images: int
) -> list[MemoryPart]:
    """Memory that a conversation of ``context`` positions takes; parts that take none are left out."""
    model, element = manifest.model, int(BYTES_PER_VALUE[manifest.activations])
    native, engine = runner == "native", runner.startswith("tensorrt")
    cpu = native or runner == "onnxruntime-cpu"
    basis: Basis = "measured" if cpu and manifest.activations == "fp32" else "assumed"

    decoder, vision = resident_decoder(manifest, runner), stored(manifest, spec.VISION_GRAPH)
    if cpu and manifest.weights.vision == "fp16":
        vision = int(vision * VISION_FLOAT16)
    kv = context * kv_position(manifest, kv_type, runner)
    held = (
        MemoryPart("decoder weights, mapped", decoder, decoder, "computed")
        if native
        else MemoryPart("decoder weights", decoder, stored(manifest, spec.DECODER_GRAPH) if engine else decoder, basis)
    )
    parts = [held, MemoryPart("vision weights", vision, vision, basis), MemoryPart("K/V cache", kv, kv, "computed")]
    if native:
        parts.append(_native_prefill(model.decoder, context))
    else:
        parts += _session_prefill(manifest, runner, context, kv, basis)
    if images:
        tower = model.vision  # sees one image at a time
        rows = tower.num_tokens * (3 * tower.hidden_size + 2 * tower.intermediate_size)
        work = (rows + tower.num_attention_heads * tower.num_tokens**2) * element
        parts.append(MemoryPart("vision tower at work", int(work * (1 if engine else VISION_ARENA)), work, basis))
        cached = min(images, CACHED_IMAGES) * model.rows_per_image * model.decoder.hidden_size
        parts.append(MemoryPart("images", 4 * (images * 3 * tower.image_size**2 + cached), 0, "computed"))
    if cpu:
        # Already taken when a load is checked.
        parts.append(MemoryPart("Python, ONNX Runtime", CPU_RUNTIME, 0, "measured"))
    elif device.shared:
        parts.append(MemoryPart("CUDA, Python, libraries", CUDA_CONTEXT + CPU_RUNTIME + CUDA_LIBRARIES, 0, "assumed"))
    else:
        parts.append(MemoryPart("CUDA context", CUDA_CONTEXT, 0, "assumed"))
    return [part for part in parts if part.size]


def _native_prefill(decoder: DecoderConfig, context: int) -> MemoryPart:
    """What a step of the native core works in; its K/V cache grows without a copy."""
    width, inner = decoder.hidden_size, decoder.intermediate_size
    work = min(BLOCK, context) * (4 * (6 * width + inner) + NATIVE_SPARE * inner)
    return MemoryPart("prefill", work, 0, "computed")


def _session_prefill(manifest: Manifest, runner: Runner, context: int, kv: int, basis: Basis) -> list[MemoryPart]:
    """What a prefill of ONNX Runtime or an engine works in, and the growth of a K/V cache of ``kv`` bytes."""
    decoder, element = manifest.model.decoder, int(BYTES_PER_VALUE[manifest.activations])
    engine = runner.startswith("tensorrt")
    old = max(0, context - GROWTH) * kv // context
    # Beyond the length that dynamic scaling leaves alone a prompt runs as one block.
    steady = decoder.steady_limit
    block = context if steady is not None and context > steady else min(PREFILL_BLOCK, context)
    feed_forwards = 2 + (0 if engine else decoder.num_hidden_layers)
    stream = block * (4 * decoder.hidden_size + feed_forwards * decoder.intermediate_size) * element
    scores = block * context * decoder.num_attention_heads * element
    return [
        # A full buffer is copied into a longer one and released only then; of a new one on the CPU, what nothing was
        # written to takes no memory yet.
        MemoryPart("K/V cache, growing", max(0, 2 * old - kv) if runner == "onnxruntime-cpu" else old, 0, "computed"),
        MemoryPart("prefill", int((1 if engine else ARENA) * stream) + scores, scores, basis),
    ]


def kv_position(manifest: Manifest, kv_type: KvType, runner: Runner) -> int:
    """Bytes that keys and values of one position take in all layers."""
    decoder = manifest.model.decoder
    scales = 2 * 4 * decoder.num_hidden_layers * decoder.num_attention_heads  # of each token and head
    return manifest.kv_bytes(kv_type) + (scales if runner == "native" and kv_type == "int8" else 0)


def stored(manifest: Manifest, graph: str) -> int:
    """Bytes of a graph's weights; 0 without external data."""
    entry = manifest.files.get(f"{graph}.data")
    return 0 if entry is None else entry.size


def decoder_bytes(manifest: Manifest, *, resident: bool = False) -> tuple[float, float, float]:
    """Bytes of the decoder's matrices: those of the text (or shared), the image branch's own, and the head.

    As stored, or ``resident`` as ONNX Runtime's CPU provider holds them (see above).
    """
    config, weights = manifest.model.decoder, manifest.weights
    width, layers = config.hidden_size, config.num_hidden_layers
    per_group = BYTES_PER_VALUE[manifest.activations] + (4 if resident else 0)

    def size(count: int, weight_type: WeightType) -> float:
        stored_bytes = count * BYTES_PER_VALUE[weight_type]
        if weight_type.startswith("fp"):
            return count * 4.0 if resident else stored_bytes
        return stored_bytes + (count * per_group / weights.group_size if weights.group_size > 0 else 0)

    return (
        size(layers * (4 * width**2 + 3 * width * config.intermediate_size), weights.decoder),
        size(layers * 2 * width**2, weights.decoder),
        size(config.vocab_size * width, weights.head),
    )


def resident_decoder(manifest: Manifest, runner: Runner) -> int:
    if runner == "onnxruntime-cpu":
        growth = sum(decoder_bytes(manifest, resident=True)) / sum(decoder_bytes(manifest))
        return int(stored(manifest, spec.DECODER_GRAPH) * growth)
    return engine_bytes(manifest) if runner.startswith("tensorrt") else stored(manifest, spec.DECODER_GRAPH)


def engine_bytes(manifest: Manifest) -> int:
    """Bytes of the decoder's engine: integer matrices once, floating-point ones once per profile."""
    matrices = decoder_bytes(manifest)
    weight_types = (manifest.weights.decoder, manifest.weights.decoder, manifest.weights.head)
    floating = sum(size for size, name in zip(matrices, weight_types) if name.startswith("fp")) / sum(matrices)
    return int(stored(manifest, spec.DECODER_GRAPH) * ENGINE_PER_FILE * (1 + (ENGINE_PROFILES - 1) * floating))


def build_bytes(manifest: Manifest) -> int:
    """Bytes of the CPU's memory that building the decoder's engine takes, an estimate."""
    return int(BUILD_PER_ENGINE * engine_bytes(manifest))


def weights_per_token(manifest: Manifest, runner: Runner) -> int:
    """Bytes of weights that every token reads: the decoder's text branch and the head, in one profile of an engine."""
    cpu = runner == "onnxruntime-cpu"
    text, image, head = decoder_bytes(manifest, resident=cpu)
    held = resident_decoder(manifest, runner) if cpu else stored(manifest, spec.DECODER_GRAPH)
    return int(held * (text + head) / (text + image + head))
