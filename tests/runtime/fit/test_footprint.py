"""Memory by its parts and bytes per token, for bundles of 7B shapes."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from planning import FORMS, MODEL, WEIGHTS, can_be_exported, cases, cpu, device, manifest

from owl2 import Plan
from owl2.runtime import spec
from owl2.runtime.bundle import Manifest, read_manifest
from owl2.runtime.config import RopeScaling
from owl2.runtime.fit.footprint import stored
from owl2.runtime.fit.machine import MemoryBudget
from owl2.runtime.fit.products import GIB
from owl2.runtime.spec import DialectName, FloatType, KvType


def sizes(plan: Plan) -> dict[str, int]:
    return {part.name: part.size for part in plan.parts}


def test_int4_weights_of_7b() -> None:
    """Against figures by hand: 32 layers of 6 square and 3 wide matrices, a head of 8 bits."""
    layers = 32 * (6 * 4096 * 4096 + 3 * 4096 * 11008)
    plan = Plan(manifest(), cpu(32), 2048, "fp32", backend="onnxruntime")
    found = sizes(plan)
    assert stored(plan.manifest, spec.DECODER_GRAPH) == layers * 4.25 / 8 + 32000 * 4096 * 8.25 / 8
    assert found["decoder weights"] == pytest.approx(layers * 4.5 / 8 + 32000 * 4096 * 8.5 / 8, rel=1e-6)
    assert found["K/V cache"] == 2 * GIB
    # The last step of growth copies 1792 positions out of a buffer of 1792.
    assert found["K/V cache, growing"] == 1.5 * GIB


def test_kv_of_the_dialects() -> None:
    def kv(bundle: Manifest, kv_type: KvType) -> int:
        return sizes(Plan(bundle, cpu(32), 1, kv_type, backend="onnxruntime"))["K/V cache"]

    assert kv(manifest(), "fp32") == 2 * 32 * 4096 * 4
    assert kv(manifest(num_attention_heads=64, hidden_size=2560), "int8") == 2 * 32 * 64 * 48
    assert kv(manifest("int4", "onnx", "fp16"), "fp16") == 2 * 32 * 4096 * 2
    odd = manifest("int4", "onnx", "fp16", hidden_size=320, num_attention_heads=8)
    assert kv(odd, "fp16") == 2 * 32 * 384 * 2


def test_the_native_core_maps_what_is_stored() -> None:
    plans = [Plan(manifest(), cpu(32), 2048, kv_type, backend="native") for kv_type in ("fp32", "fp16", "int8")]
    for plan, kv in zip(plans, (2 * GIB, GIB, GIB // 2 + 2048 * 2 * 32 * 32 * 4)):
        found = sizes(plan)
        assert found["decoder weights, mapped"] == stored(plan.manifest, spec.DECODER_GRAPH)
        assert found["K/V cache"] == kv
        assert "K/V cache, growing" not in found


def test_the_token_table_costs_nothing() -> None:
    assert "embed" not in " ".join(sizes(Plan(manifest(), cpu(32), 2048, "fp32")))


def test_float16_files_take_twice_their_size_on_a_cpu_and_once_on_a_gpu() -> None:
    bundle = manifest("fp16")
    on_cpu, on_gpu = (
        sizes(Plan(bundle, budget, 2048, "fp32", backend="onnxruntime")) for budget in (cpu(64), device("rtx4090"))
    )
    assert on_cpu["decoder weights"] == 2 * stored(bundle, spec.DECODER_GRAPH)
    assert on_gpu["decoder weights"] == stored(bundle, spec.DECODER_GRAPH)


@pytest.mark.parametrize("name", ["orin-nx-16gb", "rtx3060"])
@pytest.mark.parametrize("form", FORMS)
def test_more_of_anything_takes_more_memory(name: str, form: tuple[DialectName, FloatType]) -> None:
    budget, (dialect, activations) = device(name), form
    weight_types = [weights for weights in WEIGHTS if can_be_exported(weights, *form)]
    for weights in weight_types:
        plan = Plan(manifest(weights, dialect, activations), budget, 2048, activations)
        contexts = [replace(plan, context=context).needed for context in range(128, 4097, 64)]
        assert contexts == sorted(set(contexts))
        images = [replace(plan, images=count).needed for count in (0, 1, 2, 16, 17, 30)]
        assert images == sorted(set(images))
        int8, fp16, fp32 = (replace(plan, kv_type=kv_type).needed for kv_type in ("int8", "fp16", "fp32"))
        assert int8 < fp16 < fp32
    needed = [Plan(manifest(weights, *form), budget, 2048, activations).needed for weights in weight_types]
    assert needed == sorted(set(needed))


def test_the_least_is_no_more_than_the_estimate() -> None:
    for plan in cases():
        for part in plan.parts:
            assert 0 <= part.least <= part.size


def test_dynamic_scaling_runs_long_prompts_in_one_block() -> None:
    plain = Plan(manifest(), cpu(32), 2048, "fp32", backend="onnxruntime")
    config = replace(MODEL.decoder, rope_scaling=RopeScaling("dynamic", 2.0))
    scaled = replace(plain, manifest=replace(plain.manifest, model=replace(MODEL, decoder=config)))
    assert scaled.needed == plain.needed
    assert replace(scaled, context=2112).needed > replace(plain, context=2112).needed + GIB


def test_engines() -> None:
    bundle = manifest("int4", "onnx", "fp16")

    def on(budget: MemoryBudget) -> Plan:
        return Plan(bundle, budget, 2048, "fp16")

    runners = {name: on(device(name)).runner for name in ("orin-nano-8gb", "rtx3060", "a100-40gb")}
    assert runners == {"orin-nano-8gb": "tensorrt", "rtx3060": "tensorrt-rtx", "a100-40gb": "tensorrt"}
    plan = on(device("agx-orin-32gb"))
    # The one build of 7B shapes that was watched: 4.14 GiB of engine, 16.2 GiB at the peak.
    assert sizes(plan)["decoder weights"] == pytest.approx(4.14 * GIB, rel=0.02)
    assert plan.building == pytest.approx(16.2 * GIB, rel=0.02)
    assert plan.to_json()["building"]["fits"] is True
    assert Plan(manifest(), cpu(8), 2048, "fp32").building is None
    assert on(device("rtx3060")).to_json()["building"]["fits"] is None


def test_floating_matrices_are_in_an_engine_once_per_profile() -> None:
    """All of a float16 decoder, and of an int4 one the head; a token still reads them once."""
    plan = Plan(manifest("fp16", "onnx", "fp16"), device("agx-orin-64gb"), 512, "fp16")
    decoder = stored(plan.manifest, spec.DECODER_GRAPH)
    found = {part.name: part for part in plan.parts}
    # The small engine that was measured, with little in it but matrices: 27.99 MB of 10.35 MB.
    assert 2 <= found["decoder weights"].size / decoder <= 27.99 / 10.35
    assert found["decoder weights"].least == decoder
    assert found["vision weights"].size == stored(plan.manifest, spec.VISION_GRAPH)
    int4 = replace(plan, manifest=manifest("int4", "onnx", "fp16"))
    expected = stored(int4.manifest, spec.DECODER_GRAPH) + 2 * 32000 * 4096
    assert sizes(int4)["decoder weights"] == pytest.approx(expected, rel=0.02)
    assert plan.bytes_per_token[0] < decoder


def test_on_a_gpu_a_cache_that_grows_exists_twice() -> None:
    for dialect in ("ort", "onnx"):
        found = sizes(Plan(manifest("int4", dialect, "fp16"), device("rtx4090"), 2048, "fp16"))
        assert (found["K/V cache"], found["K/V cache, growing"]) == (GIB, 7 * GIB // 8)


class TestBytesPerToken:
    def test_they_are_those_of_the_graph(self, sample_bundle: Path) -> None:
        """Against the weights of the real graph: all but the image branch's and what is not part of a layer."""
        graph = onnx.load(sample_bundle / spec.DECODER_GRAPH, load_external_data=False).graph
        weights = {tensor.name: external_size(tensor) for tensor in graph.initializer}
        read = sum(size for name, size in weights.items() if ".multiway.1" not in name)
        assert read < 0.97 * sum(weights.values())
        weights_read, kv = Plan(read_manifest(sample_bundle), device("rtx3060"), 512, "fp32").bytes_per_token
        # The file has gains of norms and padding to pages, too.
        assert weights_read == pytest.approx(read, rel=0.06)
        assert kv == 512 * 2 * 5 * 256 * 4

    def test_int4_of_7b_on_an_rtx_3060(self) -> None:
        plan = Plan(manifest("int4", "ort", "fp16"), device("rtx3060"), 2048, "fp16")
        layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
        weights, kv = plan.bytes_per_token
        assert weights == pytest.approx(layers * 4.125 / 8 + 32000 * 4096 * 8.125 / 8, rel=1e-6)
        assert kv == GIB
        assert plan.tokens_per_second == pytest.approx((360e9 / weights, 360e9 / (weights + GIB)))

    def test_unknown_bandwidth(self) -> None:
        assert Plan(manifest(), cpu(32), 2048, "fp32").tokens_per_second is None


def external_size(tensor: onnx.TensorProto) -> int:
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)
