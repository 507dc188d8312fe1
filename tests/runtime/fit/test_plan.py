"""Plans for bundles of 7B shapes: what stands in the way, and what makes them fit."""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import WEIGHTS, cases, cpu, device, manifest, nvidia_smi

import owl2
from owl2 import BackendUnavailableError, BundleError, ConfigError, Plan
from owl2.runtime import spec
from owl2.runtime.bundle import Manifest
from owl2.runtime.fit.footprint import stored
from owl2.runtime.fit.plan import CONTEXT_STEP
from owl2.runtime.fit.products import GIB, PRODUCTS
from owl2.runtime.spec import KvType


class TestProblems:
    @pytest.mark.parametrize(
        ("bundle", "name", "kv_type", "words"),
        [
            (manifest("int4", "onnx", "fp16"), "t4", "fp16", r"no int4 weights on NVIDIA T4 \(SM75\); export with"),
            (manifest(), "rtx4090", "fp32", "fp32; export with .* --activations fp16, or run it on the CPU"),
            (manifest("fp16"), "orin-nx-16gb", "int8", "export with --dialect ort --weights fp16 --activations fp16"),
        ],
    )
    def test_what_memory_does_not_mend(self, bundle: Manifest, name: str, kv_type: KvType, words: str) -> None:
        plan = Plan(bundle, device(name), 512, kv_type)
        assert not plan.fits
        assert plan.problem is not None
        assert re.search(words, plan.problem)

    def test_tensorrt_graphs_on_a_cpu(self) -> None:
        plan = Plan(manifest("int4", "onnx", "fp16"), cpu(32), 2048, "fp16")
        assert plan.problem is not None
        assert "which CPU of this machine" in plan.problem
        assert list(plan.suggestions) == ["export with --dialect ort --weights int4 --activations fp32"]

    def test_float32_activations_on_a_gpu(self) -> None:
        """CUDA has no float32 GroupQueryAttention, so every product refuses them; the CPU takes them."""
        for name in PRODUCTS:
            for weights in WEIGHTS:
                assert Plan(manifest(weights), device(name), 512, "fp32").problem
        assert Plan(manifest(), cpu(8), 512, "fp32").problem is None
        plan = Plan(manifest(), device("rtx4090"), 2048, "fp32")
        assert list(plan.suggestions) == ["export with --dialect ort --weights int4 --activations fp16"]
        (after,) = plan.suggestions.values()
        assert after.kv_type == "fp16"


class TestSuggestions:
    def test_what_is_suggested_fits_when_it_is_done(self) -> None:
        options: set[str] = set()
        for plan in cases():
            assert plan.fits == (plan.problem is None and plan.needed <= plan.available)
            assert not (plan.fits and plan.suggestions)
            for change, after in plan.suggestions.items():
                assert after.fits, (plan, change)
                assert not after.suggestions
                bundle = after.manifest
                again = manifest(bundle.weights.decoder, bundle.dialect, bundle.activations)
                assert (bundle.weights.head, bundle.weights.vision) == (again.weights.head, again.weights.vision)
                assert list(bundle.kv_cache) == list(again.kv_cache)
                for graph in (spec.DECODER_GRAPH, spec.VISION_GRAPH):
                    assert stored(bundle, graph) == pytest.approx(stored(again, graph), rel=1e-6)
                if "export" in change:
                    exported = (bundle.dialect, bundle.weights.decoder, bundle.activations)
                    assert "export with --dialect {} --weights {} --activations {}".format(*exported) in change
                options.update(word for word in change.split() if word.startswith("--"))
        assert options == {"--context", "--kv-cache", "--weights", "--activations", "--dialect"}

    def test_the_longest_context_is_suggested(self) -> None:
        for gibibytes in (7.0, 7.6, 8.2):
            plan = Plan(manifest(), cpu(gibibytes), 2048, "fp32", backend="onnxruntime")
            change, after = next(item for item in plan.suggestions.items() if item[0].startswith("--context"))
            assert change == f"--context {after.context}"
            assert not replace(plan, context=after.context + CONTEXT_STEP).fits

    def test_closing_the_desktop_is_suggested_by_itself_where_it_is_enough(self) -> None:
        for available in range(7 * GIB, 10 * GIB, GIB // 8):
            budget = replace(device("orin-nx-16gb"), available=available)
            plan = Plan(manifest("int4", "ort", "fp16"), budget, 4096, "fp16")
            alone = any(change.startswith("close") and " and " not in change for change in plan.suggestions)
            assert alone == (not plan.fits and plan.needed <= available + budget.closable)

    def test_several_at_once_where_one_is_not_enough(self) -> None:
        plan = Plan(manifest("fp16"), cpu(6.4), 2048, "fp32")
        assert list(plan.suggestions) == [
            "export with --dialect ort --weights int4 --activations fp32 and --kv-cache int8"
        ]
        plan = Plan(manifest(), cpu(6.4), 2048, "fp32")
        both, shorter = plan.suggestions
        assert re.fullmatch(r"--kv-cache int8|--kv-cache int8 and --context \d+", both)
        assert re.fullmatch(r"--context \d+", shorter)

    def test_nothing_helps(self) -> None:
        assert Plan(manifest("int4", "ort", "fp16"), device("orin-nano-4gb"), 2048, "fp16").suggestions == {}

    def test_int4_files_are_as_large_as_an_export_makes_them(self) -> None:
        """The size of a suggested export is estimated from its shapes."""
        for weights in ("int8", "fp16", "fp32"):
            plan = Plan(manifest(weights), cpu(7.0), 512, "int8")
            change, after = next(iter(plan.suggestions.items()))
            assert change == "export with --dialect ort --weights int4 --activations fp32"
            expected = stored(manifest("int4"), spec.DECODER_GRAPH)
            assert stored(after.manifest, spec.DECODER_GRAPH) == pytest.approx(expected, rel=1e-6)


class TestFunction:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Manifest], Path]:
        """Write a bundle that is nothing but its manifest, on a machine without a GPU."""
        monkeypatch.setenv("PATH", str(tmp_path))

        def make(content: Manifest) -> Path:
            (tmp_path / spec.MANIFEST).write_text(json.dumps(content.sealed()))
            return tmp_path

        return make

    def test_defaults(self, folder: Callable[[Manifest], Path]) -> None:
        bundle = folder(manifest())
        plan = owl2.plan(str(bundle), device="orin-nx-16gb")
        assert (plan.context, plan.kv_type, plan.images) == (2048, "fp32", 1)
        assert plan.budget == device("orin-nx-16gb")
        assert plan.notes == ()
        changed = owl2.plan(bundle, device="orin-nx-16gb", context=1024, kv_cache="int8", images=3)
        assert changed.parts == Plan(manifest(), device("orin-nx-16gb"), 1024, "int8", 3).parts

    def test_this_machine(self, folder: Callable[[Manifest], Path]) -> None:
        bundle = folder(manifest("int4", "ort", "fp16"))
        plan = owl2.plan(bundle)
        assert plan.budget.here
        assert plan.budget.device.name == "cpu"
        assert plan.budget.device.bandwidth is not None
        assert "planning for the CPU" in plan.notes[0]
        assert owl2.plan(bundle, device="cpu").notes == ()
        with pytest.raises(BackendUnavailableError, match=r"no GPU is found .*; name a product of owl2 plan --list"):
            owl2.plan(bundle, device="gpu")
        nvidia_smi(bundle, "NVIDIA L4, 23034, 22000, 8.9")
        for name in (None, "this", "gpu"):
            assert owl2.plan(bundle, device=name).budget.device.product == "NVIDIA L4"
        assert owl2.plan(bundle, device="cpu").budget.device.name == "cpu"

    def test_it_reads_well(self, folder: Callable[[Manifest], Path]) -> None:
        bundle = folder(manifest("int4", "ort", "fp16"))
        plan = owl2.plan(bundle, device="orin-nx-8gb")
        figures = f"{plan.needed / GIB:.2f} GiB needed, {plan.available / GIB:.2f} GiB available"
        line = f"{bundle} on NVIDIA Jetson Orin NX 8GB: does not fit, {figures}"
        assert repr(plan) == f"<Plan {line}>"
        assert str(plan).splitlines() == [line, *(f"  to make it fit: {change}" for change in plan.suggestions)]
        assert plan.suggestions

    def test_it_can_be_pickled_and_is_plain_json(self, folder: Callable[[Manifest], Path]) -> None:
        plan = owl2.plan(folder(manifest()), device="rtx3060")
        assert pickle.loads(pickle.dumps(plan)) == plan
        assert json.loads(json.dumps(plan.to_json())) == plan.to_json()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"device": "rtx1"}, "device 'rtx1' is not known; known: this, gpu, cpu, orin-nano-4gb"),
            ({"kv_cache": "fp16", "backend": "onnxruntime"}, "kv_cache 'fp16': this bundle offers fp32, int8"),
            ({"context": 4096}, "context 4096 exceeds the 2048 positions"),
            ({"images": 40}, "40 images take 2600 positions and leave none of the context of 2048"),
            ({"images": -1}, "images must not be negative, got -1"),
        ],
    )
    def test_mistakes(self, folder: Callable[[Manifest], Path], settings: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            owl2.plan(folder(manifest()), **settings)

    def test_no_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="is not a bundle"):
            owl2.plan(tmp_path, device="rtx3060")
