"""Planning bundles of 7B shapes for devices, from manifests alone, and the check before a load."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from owl2 import BackendError, ConfigError, InsufficientMemoryError, Owl2
from owl2.export.config import ExportConfig
from owl2.runtime import spec
from owl2.runtime.__main__ import cli
from owl2.runtime.bundle import Manifest, WeightFormat, read_manifest
from owl2.runtime.config import (
    AbstractorConfig,
    DecoderConfig,
    ModelConfig,
    PreprocessConfig,
    RopeScaling,
    VisionConfig,
)
from owl2.runtime.errors import BundleCorruptError
from owl2.runtime.fit.footprint import (
    BundleSizes,
    MemoryBudget,
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
from owl2.runtime.fit.machine import DetectedDevice, Memory, SystemPaths, this_cpu
from owl2.runtime.fit.plan import CONTEXT_STEP, check_memory, make_plan
from owl2.runtime.fit.products import GIB, PRODUCTS, find_product
from owl2.runtime.kv_cache import GROWTH
from owl2.runtime.placement import Placement
from owl2.runtime.verification import FileEntry

MODEL = ModelConfig(VisionConfig(), AbstractorConfig(), DecoderConfig(), PreprocessConfig())
MEMINFO = "MemTotal:        {total} kB\nMemFree:          187000 kB\nMemAvailable:    {available} kB\n"
WEIGHTS = ("int4", "int8", "fp16", "fp32")


def stored(weights: str = "int4", dialect: str = "ort", activations: str = "fp32", **decoder: Any) -> BundleSizes:
    """A 7B bundle as owl2-export makes it with these options, its files of the sizes that the weights take."""
    config = ExportConfig(Path("in"), Path("out"), weights=weights, dialect=dialect, activations=activations)
    model = replace(MODEL, decoder=replace(MODEL.decoder, **decoder))
    group = 0 if config.quant is None else config.group_size
    types = config.types
    kinds = WeightFormat(types.decoder, types.head, types.vision, types.embeddings, "rtn", group)
    caches = ("fp32", "int8") if (dialect, activations) == ("ort", "fp32") else (activations,)
    made = BundleSizes(model, kinds, dialect, activations, caches, 0, 0)
    width = {"fp32": 4, "fp16": 2, "int8": 1}[kinds.vision]
    return replace(made, decoder=int(sum(decoder_bytes(made, resident=False))), vision=width * vision_weights(model))


def can_be_exported(weights: str, dialect: str, activations: str) -> bool:
    """Whether owl2-export takes these options together."""
    try:
        ExportConfig(Path("in"), Path("out"), weights=weights, dialect=dialect, activations=activations)
    except ConfigError:
        return False
    return True


def manifest(bundle: BundleSizes | None = None) -> Manifest:
    """The same as a manifest: int4 and float32 activations, if no other is given."""
    bundle = bundle or stored()
    files = {"decoder.onnx.data": bundle.decoder, "vision.onnx.data": bundle.vision, "embeddings.bin": 32000 * 4096 * 2}
    return Manifest(
        format=spec.FORMAT_VERSION,
        producer="owl2 test",
        dialect=bundle.dialect,
        activations=bundle.activations,
        minimum_onnxruntime="1.22",
        kv_cache={kind: "1.27" if kind == "int8" else "1.22" for kind in bundle.kv_caches},
        family="mplug_owl2",
        weights=bundle.weights,
        model=bundle.model,
        files={name: FileEntry(size, "0" * 64) for name, size in files.items()},
        engines={},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of 7B shapes that is nothing but its manifest."""
    (tmp_path / spec.MANIFEST).write_text(json.dumps(manifest().to_json()))
    return tmp_path


@pytest.fixture
def gpu_folder(tmp_path: Path) -> Path:
    """The same for ONNX Runtime on a GPU."""
    (tmp_path / spec.MANIFEST).write_text(json.dumps(manifest(stored("int4", "ort", "fp16")).to_json()))
    return tmp_path


@pytest.fixture
def small_machine(tmp_path: Path) -> SystemPaths:
    """4 GB of memory, 3.1 GiB of it available."""
    return machine(tmp_path, 3884364, 3221225)


def machine(folder: Path, total: int, available: int) -> SystemPaths:
    meminfo = folder / "meminfo"
    meminfo.write_text(MEMINFO.format(total=total, available=available))
    return SystemPaths(meminfo, *(folder / "none" for _ in range(4)))


def nvidia_smi(folder: Path, *lines: str) -> None:
    """A program of that name that answers what the real one answered."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)


def cpu(gibibytes: float) -> MemoryBudget:
    """The CPU of a machine with so much memory available."""
    found = this_cpu()
    assert found is not None
    memory = int(gibibytes * GIB)
    return MemoryBudget(replace(found.device, memory=memory), memory, 0, memory, here=True)


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["plan", *map(str, args)], prog_name="owl2")


def cases() -> Iterator[Scenario]:
    """Every device with every kind of bundle, and CPUs of three sizes."""
    targets = [*map(MemoryBudget.of_table, PRODUCTS.values()), cpu(3), cpu(8), cpu(32)]
    forms = (("ort", "fp32"), ("ort", "fp16"), ("onnx", "fp16"))
    for target, weights, (dialect, activations) in product(targets, WEIGHTS, forms):
        if can_be_exported(weights, dialect, activations):
            yield Scenario(stored(weights, dialect, activations), target, Settings(2048, activations))


class TestFootprint:
    def test_int4_weights_of_7b(self) -> None:
        """Against figures by hand: 32 layers of 6 square and 3 wide matrices, a head of 8 bits."""
        layers = 32 * (6 * 4096 * 4096 + 3 * 4096 * 11008)
        scenario = Scenario(stored(), cpu(32), Settings(2048, "fp32"))
        found = {part.name: part.size for part in parts(scenario)}
        assert scenario.bundle.decoder == layers * 4.25 / 8 + 32000 * 4096 * 8.25 / 8
        assert found["decoder weights"] == pytest.approx(layers * 4.5 / 8 + 32000 * 4096 * 8.5 / 8, rel=1e-6)
        assert found["K/V cache"] == 2 * GIB
        # The last step of growth copies 1792 positions out of a buffer of 1792.
        assert found["K/V cache, growing"] == 1.5 * GIB

    def test_kv_of_the_dialects(self) -> None:
        assert kv_bytes(stored(), "fp32") == 2 * 32 * 4096 * 4
        assert kv_bytes(stored(num_attention_heads=64, hidden_size=2560), "int8") == 2 * 32 * 64 * 48
        assert kv_bytes(stored("int4", "onnx", "fp16"), "fp16") == 2 * 32 * 4096 * 2
        odd = stored("int4", "onnx", "fp16", hidden_size=320, num_attention_heads=8)
        assert kv_bytes(odd, "fp16") == 2 * 32 * 384 * 2

    def test_the_token_table_costs_nothing(self) -> None:
        assert "embed" not in " ".join(part.name for part in parts(Scenario(stored(), cpu(32), Settings(2048, "fp32"))))

    def test_float16_files_take_twice_their_size_on_a_cpu_and_once_on_a_gpu(self) -> None:
        bundle = stored("fp16")
        on_cpu, on_gpu = (
            {part.name: part.size for part in parts(Scenario(bundle, target, Settings(2048, "fp32")))}
            for target in (cpu(64), MemoryBudget.of_table(find_product("rtx4090")))
        )
        assert on_cpu["decoder weights"] == 2 * bundle.decoder
        assert on_gpu["decoder weights"] == bundle.decoder

    @pytest.mark.parametrize("device", ["orin-nx-16gb", "rtx3060"])
    @pytest.mark.parametrize("form", [("ort", "fp32"), ("ort", "fp16"), ("onnx", "fp16")])
    def test_more_of_anything_takes_more_memory(self, device: str, form: tuple[str, str]) -> None:
        target = MemoryBudget.of_table(find_product(device))
        kinds = [weights for weights in WEIGHTS if can_be_exported(weights, *form)]
        for weights in kinds:
            bundle = stored(weights, *form)

            def need(
                context: int = 2048,
                images: int = 1,
                kind: str = form[1],
                of: BundleSizes = bundle,
                at: MemoryBudget = target,
            ) -> int:
                return needed(Scenario(of, at, Settings(context, kind, images)))

            contexts = [need(context=context) for context in range(128, 4097, 64)]
            assert contexts == sorted(set(contexts))
            images = [need(images=count) for count in (0, 1, 2, 16, 17, 30)]
            assert images == sorted(set(images))
            assert need(kind="int8") < need(kind="fp16") < need(kind="fp32")
        sizes = [needed(Scenario(stored(weights, *form), target, Settings(2048, form[1]))) for weights in kinds]
        assert sizes == sorted(set(sizes))

    def test_the_least_is_no_more_than_the_estimate(self) -> None:
        for scenario in cases():
            for part in parts(scenario):
                assert 0 <= part.least <= part.size

    def test_dynamic_scaling_runs_long_prompts_in_one_block(self) -> None:
        plain = Scenario(stored(), cpu(32), Settings(2048, "fp32"))
        config = replace(MODEL.decoder, rope_scaling=RopeScaling("dynamic", 2.0))
        scaled = replace(plain, bundle=replace(plain.bundle, model=replace(MODEL, decoder=config)))
        assert needed(scaled) == needed(plain)
        longer = Settings(2112, "fp32")
        assert needed(replace(scaled, settings=longer)) > needed(replace(plain, settings=longer)) + GIB

    def test_engines(self) -> None:
        bundle = stored("int4", "onnx", "fp16")
        ways = {
            name: runner(Scenario(bundle, MemoryBudget.of_table(find_product(name)), Settings(2048, "fp16")))
            for name in ("orin-nano-8gb", "rtx3060", "a100-40gb")
        }
        assert ways == {"orin-nano-8gb": "tensorrt", "rtx3060": "tensorrt-rtx", "a100-40gb": "tensorrt"}
        scenario = Scenario(bundle, MemoryBudget.of_table(find_product("agx-orin-32gb")), Settings(2048, "fp16"))
        made = building(scenario)
        assert made is not None
        # The one build of 7B shapes that was watched: 4.14 GiB of engine, 16.2 GiB at the peak.
        assert {part.name: part.size for part in parts(scenario)}["decoder weights"] == pytest.approx(
            4.14 * GIB, rel=0.02
        )
        assert made.needed == pytest.approx(16.2 * GIB, rel=0.02)
        assert made.fits
        assert building(Scenario(stored(), cpu(8), Settings(2048, "fp32"))) is None
        elsewhere = building(Scenario(bundle, MemoryBudget.of_table(find_product("rtx3060")), Settings(2048, "fp16")))
        assert elsewhere is not None
        assert elsewhere.fits is None

    def test_floating_matrices_lie_in_an_engine_once_per_profile(self) -> None:
        """All of a float16 decoder, and of an int4 one the head; a token still reads them once."""
        scenario = Scenario(
            stored("fp16", "onnx", "fp16"), MemoryBudget.of_table(find_product("agx-orin-64gb")), Settings(512, "fp16")
        )
        found = {part.name: part for part in parts(scenario)}
        # The small engine that was measured, with little beside its matrices: 27.99 MB of 10.35 MB.
        assert 2 <= found["decoder weights"].size / scenario.bundle.decoder <= 27.99 / 10.35
        assert found["decoder weights"].least == scenario.bundle.decoder
        assert found["vision weights"].size == scenario.bundle.vision
        int4 = replace(scenario, bundle=stored("int4", "onnx", "fp16"))
        weights = {part.name: part.size for part in parts(int4)}["decoder weights"]
        assert weights == pytest.approx(int4.bundle.decoder + 2 * 32000 * 4096, rel=0.02)
        assert ceiling(scenario).weights < scenario.bundle.decoder

    def test_on_a_gpu_a_cache_that_grows_is_there_twice(self) -> None:
        for dialect in ("ort", "onnx"):
            scenario = Scenario(
                stored("int4", dialect, "fp16"), MemoryBudget.of_table(find_product("rtx4090")), Settings(2048, "fp16")
            )
            found = {part.name: part.size for part in parts(scenario)}
            assert (found["K/V cache"], found["K/V cache, growing"]) == (GIB, 7 * GIB // 8)

    @pytest.mark.parametrize(
        ("bundle", "device", "kind", "words"),
        [
            (stored("int4", "onnx", "fp16"), "t4", "fp16", r"no int4 weights on NVIDIA T4 \(SM75\); export with"),
            (stored(), "rtx3060", "fp16", "has no fp16 K/V cache, only fp32, int8; export with --activations fp16"),
            (stored("int4", "onnx", "fp16"), "rtx3060", "int8", "has no int8 K/V cache, only fp16; export with"),
            (stored(), "rtx4090", "fp32", "fp32; export with --activations fp16 --vision fp16, or run it on the CPU"),
            (stored("fp16"), "orin-nx-16gb", "int8", "export with --activations fp16 --vision fp16"),
        ],
    )
    def test_what_memory_does_not_mend(self, bundle: BundleSizes, device: str, kind: str, words: str) -> None:
        scenario = Scenario(bundle, MemoryBudget.of_table(find_product(device)), Settings(512, kind))
        assert not fits(scenario)
        assert any(re.search(words, problem) for problem in problems(scenario))

    def test_tensorrt_graphs_on_a_cpu(self) -> None:
        plan = make_plan(Scenario(stored("int4", "onnx", "fp16"), cpu(32), Settings(2048, "fp16")))
        assert "which CPU of this machine" in plan.problems[0]
        assert [change.words for change in plan.changes] == ["export with --dialect ort --activations fp32"]

    def test_float32_activations_on_a_gpu(self) -> None:
        """CUDA has no float32 GroupQueryAttention, so every one of the table refuses them; the CPU takes them."""
        for device in PRODUCTS.values():
            for weights in WEIGHTS:
                assert problems(Scenario(stored(weights), MemoryBudget.of_table(device), Settings(512, "fp32")))
        assert not problems(Scenario(stored(), cpu(8), Settings(512, "fp32")))
        plan = make_plan(Scenario(stored(), MemoryBudget.of_table(find_product("rtx4090")), Settings(2048, "fp32")))
        assert [change.words for change in plan.changes] == ["export with --activations fp16 --vision fp16"]
        assert plan.changes[0].scenario.settings.kv_cache == "fp16"

    def test_weights_of_an_unknown_kind(self) -> None:
        bundle = stored()
        odd = replace(bundle, weights=replace(bundle.weights, decoder="int3"))
        with pytest.raises(ConfigError, match="weights 'int3' are not known; known: fp32, fp16, int8, int4"):
            make_plan(Scenario(odd, cpu(32), Settings(2048, "fp32")))


class TestChanges:
    def test_what_is_suggested_fits_when_it_is_done(self) -> None:
        kinds = set()
        for scenario in cases():
            plan = make_plan(scenario)
            assert plan.fits == (not plan.problems and plan.needed <= scenario.target.available)
            assert not (plan.fits and plan.changes)
            for change in plan.changes:
                changed = make_plan(change.scenario)
                assert changed.fits, (scenario, change.words)
                assert changed.needed == change.needed
                made = change.scenario.bundle
                again = stored(made.weights.decoder, made.dialect, made.activations)
                if "--vision" not in change.words:
                    assert (made.weights.head, made.weights.vision) == (again.weights.head, again.weights.vision)
                    assert made.kv_caches == again.kv_caches
                    assert (made.decoder, made.vision) == pytest.approx((again.decoder, again.vision), rel=1e-6)
                kinds.update(word for word in change.words.split() if word.startswith("--"))
        assert {"--context", "--kv-cache", "--weights", "--vision", "--activations", "--dialect"} <= kinds

    def test_the_longest_context_is_suggested(self) -> None:
        for gibibytes in (7.0, 7.6, 8.2):
            scenario = Scenario(stored(), cpu(gibibytes), Settings(2048, "fp32"))
            change = next(change for change in make_plan(scenario).changes if change.words.startswith("--context"))
            context = change.scenario.settings.context
            assert change.words == f"--context {context}"
            longer = replace(scenario, settings=replace(scenario.settings, context=context + CONTEXT_STEP))
            assert not fits(longer)

    def test_closing_the_desktop_is_enough_or_it_is_not_suggested_alone(self) -> None:
        for available in range(7 * GIB, 10 * GIB, GIB // 8):
            target = replace(MemoryBudget.of_table(find_product("orin-nx-16gb")), available=available)
            plan = make_plan(Scenario(stored("int4", "ort", "fp16"), target, Settings(4096, "fp16")))
            alone = any(change.words.startswith("close") and " and " not in change.words for change in plan.changes)
            assert alone == (not plan.fits and plan.needed <= available + target.closable)

    def test_several_at_once_where_one_is_not_enough(self) -> None:
        plan = make_plan(Scenario(stored("fp16"), cpu(6.4), Settings(2048, "fp32")))
        assert [change.words for change in plan.changes] == [
            "--kv-cache int8 and export with --vision int8 and export with --weights int4"
        ]

    def test_nothing_helps(self) -> None:
        target = MemoryBudget.of_table(find_product("orin-nano-4gb"))
        plan = make_plan(Scenario(stored("int4", "ort", "fp16"), target, Settings(2048, "fp16")))
        assert plan.changes == ()
        assert plan.elsewhere is not None
        assert fits(replace(plan.scenario, target=MemoryBudget.of_table(plan.elsewhere)))
        smaller = [device for device in PRODUCTS.values() if device.shared and device.memory < plan.elsewhere.memory]
        assert smaller
        assert not any(fits(replace(plan.scenario, target=MemoryBudget.of_table(device))) for device in smaller)

    def test_int4_files_are_as_large_as_an_export_makes_them(self) -> None:
        """What another export would weigh, against shapes alone."""
        for weights in ("int8", "fp16", "fp32"):
            plan = make_plan(Scenario(stored(weights), cpu(7.0), Settings(512, "int8")))
            assert plan.changes[0].words == "export with --weights int4"
            assert plan.changes[0].scenario.bundle.decoder == pytest.approx(stored("int4").decoder, rel=1e-6)


class TestCeiling:
    def test_bytes_per_token_are_those_of_the_graph(self, sample_bundle: Path) -> None:
        """Against the weights of the real graph: all but the image branch's and what is not part of a layer."""
        graph = onnx.load(sample_bundle / spec.DECODER_GRAPH, load_external_data=False).graph
        sizes = {tensor.name: _external_size(tensor) for tensor in graph.initializer}
        read = sum(size for name, size in sizes.items() if ".multiway.1" not in name)
        assert read < 0.97 * sum(sizes.values())
        bundle = BundleSizes.of(read_manifest(sample_bundle))
        on_gpu = ceiling(Scenario(bundle, MemoryBudget.of_table(find_product("rtx3060")), Settings(512, "fp32")))
        # The file has gains of norms and padding to pages besides.
        assert on_gpu.weights == pytest.approx(read, rel=0.06)
        assert on_gpu.kv == 512 * 2 * 5 * 256 * 4

    def test_int4_of_7b_on_an_rtx_3060(self) -> None:
        scenario = Scenario(
            stored("int4", "ort", "fp16"), MemoryBudget.of_table(find_product("rtx3060")), Settings(2048, "fp16")
        )
        found = ceiling(scenario)
        layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
        assert found.weights == pytest.approx(layers * 4.125 / 8 + 32000 * 4096 * 8.125 / 8, rel=1e-6)
        assert found.full == pytest.approx(360e9 / (found.weights + GIB))
        assert found.empty == pytest.approx(360e9 / found.weights)

    def test_unknown_bandwidth(self) -> None:
        found = ceiling(Scenario(stored(), cpu(32), Settings(2048, "fp32")))
        assert found.full is None


def _external_size(tensor: onnx.TensorProto) -> int:
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)


class TestBeforeALoad:
    def test_7b_on_a_machine_of_4_gb(self, small_machine: SystemPaths) -> None:
        with pytest.raises(InsufficientMemoryError) as caught:
            check_memory(manifest(), 2048, "fp32", paths=small_machine)
        message = str(caught.value)
        assert isinstance(caught.value, BackendError)
        assert message.startswith("not enough memory: at least 6.")
        for words in ("decoder weights 4.08 GiB", "K/V cache 2.00 GiB", "3.07 GiB are available", "--no-memory-check"):
            assert words in message
        needs = needed(Scenario(stored(), cpu(32), Settings(2048, "fp32", images=0)))
        assert f"what would fit: a machine with {needs / GIB:.2f} GiB of memory available" in message
        assert caught.value.needed > 6 * GIB
        assert caught.value.available == 3221225 * 1024

    def test_what_is_suggested_passes(self, tmp_path: Path) -> None:
        paths = machine(tmp_path, 7_400_000, 6_400_000)
        with pytest.raises(InsufficientMemoryError) as caught:
            check_memory(manifest(), 2048, "fp32", paths=paths)
        both, shorter = re.findall(
            r"what would fit: --kv-cache int8 and --context (\d+); or --context (\d+);", str(caught.value)
        )[0]
        assert 2048 > int(both) > int(shorter) > 0
        check_memory(manifest(), int(both), "int8", paths=paths)
        check_memory(manifest(), int(shorter), "fp32", paths=paths)

    def test_it_errs_on_the_small_side(self, tmp_path: Path) -> None:
        """What the estimate calls too large by its uncertain parts is not refused."""
        bundle = BundleSizes.of(manifest())
        tight = 7 * GIB // 1024
        paths = machine(tmp_path, tight, tight)
        found = this_cpu(paths)
        assert found is not None
        target = MemoryBudget.of_machine(found, Memory(found.available, found.available))
        assert not fits(Scenario(bundle, target, Settings(2048, "fp32")))
        check_memory(manifest(), 2048, "fp32", paths=paths)

    def test_without_a_context_the_first_positions_have_to_fit(self, tmp_path: Path) -> None:
        """A conversation may never reach the model's own context; one that was asked for is meant."""
        weights = sum(
            part.least for part in parts(Scenario(BundleSizes.of(manifest()), cpu(32), Settings(1, "fp32", 0)))
        )
        first = GROWTH * kv_bytes(stored(), "fp32")
        enough = (weights + first) // 1024 + (64 << 10)
        paths = machine(tmp_path, enough, enough)
        check_memory(manifest(), None, "fp32", paths=paths)
        check_memory(manifest(), GROWTH, "fp32", paths=paths)
        with pytest.raises(InsufficientMemoryError, match=r"K/V cache 2\.00 GiB"):
            check_memory(manifest(), 2048, "fp32", paths=paths)
        with pytest.raises(InsufficientMemoryError, match=r"K/V cache 0\.25 GiB"):
            check_memory(manifest(), None, "fp32", paths=machine(tmp_path, enough, weights // 1024))

    @pytest.mark.parametrize("kind", ["cuda", "tensorrt"])
    def test_on_a_jetson_the_gpu_has_the_cpus_memory(self, small_machine: SystemPaths, kind: Any) -> None:
        bundle = manifest(stored("int4", "onnx" if kind == "tensorrt" else "ort", "fp16"))
        model, swaps = (small_machine.meminfo.with_name(name) for name in ("model", "swaps"))
        model.write_text("NVIDIA Jetson Orin Nano Developer Kit\0")
        # A GPU cannot use it.
        swaps.write_text("Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n")
        paths = replace(small_machine, model=model, swaps=swaps)
        with pytest.raises(InsufficientMemoryError) as caught:
            check_memory(bundle, None, "fp16", Placement(kind), paths=paths)
        assert caught.value.available == 3221225 * 1024
        for words in (
            f"decoder weights {bundle.files['decoder.onnx.data'].size / GIB:.2f}",
            "; owl2 plan BUNDLE tells",
        ):
            assert words in str(caught.value)
        machine(small_machine.meminfo.parent, 8_000_000, 7_000_000)
        check_memory(bundle, None, "fp16", Placement(kind), paths=paths)

    def test_other_gpus_by_their_free_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_machine: SystemPaths
    ) -> None:
        bundle, gpu = manifest(stored("int4", "onnx", "fp16")), Placement("tensorrt-rtx")
        monkeypatch.setenv("PATH", str(tmp_path))
        check_memory(bundle, None, "fp16", gpu, paths=small_machine)  # none is found: the backend tells
        nvidia_smi(tmp_path, "NVIDIA GeForce RTX 3060, 12288, 3000, 8.6")
        with pytest.raises(InsufficientMemoryError, match="close other programs") as caught:
            check_memory(bundle, None, "fp16", gpu, paths=small_machine)
        assert caught.value.available == 3000 << 20
        nvidia_smi(tmp_path, "NVIDIA GeForce RTX 3060, 12288, 3000, 8.6", "NVIDIA GeForce RTX 3060, 12288, 11000, 8.6")
        check_memory(bundle, None, "fp16", gpu, paths=small_machine)

    def test_swap_on_a_disk_is_taken_into_account(self, small_machine: SystemPaths) -> None:
        swaps = small_machine.swaps.with_name("swaps")
        swaps.write_text("Filename Type Size Used Priority\n/swapfile file 8388604 0 -2\n")
        check_memory(manifest(), 2048, "fp32", paths=replace(small_machine, swaps=swaps))

    def test_a_system_that_does_not_tell(self, tmp_path: Path) -> None:
        check_memory(manifest(), 2048, "fp32", paths=SystemPaths(*(tmp_path / "none" for _ in range(5))))

    def test_a_load_is_refused_before_files_are_read(self, bundle_a1: Path, tmp_path: Path) -> None:
        """A manifest that claims a decoder larger than any machine; what is wrong with it is found out later."""
        copy = Path(shutil.copytree(bundle_a1, tmp_path / "bundle"))
        content = json.loads((copy / spec.MANIFEST).read_text())
        content["files"]["decoder.onnx.data"]["size"] = 1 << 60
        (copy / spec.MANIFEST).write_text(json.dumps(content))
        with pytest.raises(InsufficientMemoryError):
            Owl2.load(copy)
        with pytest.raises(BundleCorruptError):
            Owl2.load(copy, check_memory=False)
        for command in (["ask", str(copy), "q"], ["verify", str(copy)]):
            for flags, words in ((), "not enough memory"), (("--no-memory-check",), "(truncated?)"):
                result = CliRunner().invoke(cli, [*command, *flags], prog_name="owl2")
                assert result.exit_code == 1
                assert words in result.output
                assert ("owl2 plan BUNDLE --device cpu tells more" in result.output) == (not flags)


class TestCommand:
    def test_table(self, gpu_folder: Path) -> None:
        result = run(gpu_folder, "--device", "rtx4090")
        assert result.exit_code == 0, result.output
        for words in ("NVIDIA GeForce RTX 4090 (SM89): fits", "K/V cache", "1.0 GiB", "tokens/s", "assumed"):
            assert words in result.stdout

    def test_what_cannot_run_there_exits_with_1(self, folder: Path) -> None:
        result = run(folder, "--device", "rtx4090")
        assert result.exit_code == 1
        assert "RTX 4090 (SM89): CANNOT RUN" in result.stdout
        assert "what would do\n  export with --activations fp16 --vision fp16 " in result.stdout
        assert "cannot run on NVIDIA GeForce RTX 4090" in result.stderr

    def test_what_does_not_fit_exits_with_1_and_tells_what_would(self, gpu_folder: Path) -> None:
        result = run(gpu_folder, "--device", "orin-nx-8gb")
        assert result.exit_code == 1
        assert "DOES NOT FIT" in result.stdout
        assert "what would fit" in result.stdout
        assert "does not fit NVIDIA Jetson Orin NX 8GB" in result.stderr

    def test_json_and_its_suggestions_as_options(self, gpu_folder: Path) -> None:
        record = json.loads(run(gpu_folder, "--device", "rtx3070", "--json").stdout)
        assert record["needed"] == sum(part["size"] for part in record["parts"])
        assert not record["fits"]
        options = [change for change in record["changes"] if change["words"].startswith("--")]
        assert options
        for change in options:
            again = run(gpu_folder, "--device", "rtx3070", "--json", *change["words"].split())
            assert again.exit_code == 0
            assert json.loads(again.stdout)["needed"] == change["needed"]

    @pytest.mark.parametrize("device", ["this", "cpu"])
    def test_this_machine(self, sample_bundle: Path, device: str) -> None:
        result = run(sample_bundle, "--device", device, "--json")
        record = json.loads(result.stdout)
        assert result.exit_code == 0
        assert record["fits"]
        assert record["runner"].startswith("onnxruntime")

    def test_which_gpu_of_this_machine(self, gpu_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        result = run(gpu_folder, "--json")
        assert "owl2: no GPU is found" in result.stderr
        assert json.loads(result.stdout)["device"]["name"] == "cpu"
        nvidia_smi(tmp_path, "NVIDIA L4, 23034, 22000, 8.9")
        result = run(gpu_folder)
        assert (result.stderr, result.exit_code) == ("", 0)
        # The first one, as engines are built for it and sessions use it, though the other has more memory.
        nvidia_smi(tmp_path, "NVIDIA L4, 23034, 22000, 8.9", "NVIDIA H100 80GB HBM3, 81559, 81000, 9.0")
        result = run(gpu_folder, "--json")
        assert result.stderr == "owl2: 2 GPUs are found; planning for number 0, NVIDIA L4\n"
        assert json.loads(result.stdout)["available"] == 22000 << 20

    def test_list(self) -> None:
        text, record = run("--list").stdout, json.loads(run("--list", "--json").stdout)
        assert all(name in text for name in PRODUCTS)
        assert set(PRODUCTS) < {entry["name"] for entry in record}

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--device", "rtx1"), "device 'rtx1' is not known; known: this, cpu, orin-nano-4gb"),
            (("--context", 4096), "context 4096 exceeds the 2048 positions"),
            (("--images", 40), "40 images take 2600 positions and leave none of the context of 2048"),
            (("--images", -1), "images must not be negative"),
        ],
    )
    def test_mistakes(self, folder: Path, options: tuple[object, ...], words: str) -> None:
        result = run(folder, *options)
        assert result.exit_code == 1
        assert words in result.stderr

    def test_no_bundle(self) -> None:
        result = run()
        assert result.exit_code == 2
        assert "give a bundle to plan for, or --list" in result.stderr


def test_a_gpu_of_this_machine_is_planned_by_what_is_free() -> None:
    device = find_product("rtx3060")
    target = MemoryBudget.of_machine(DetectedDevice(device, 9 * GIB), Memory(32 * GIB, 20 * GIB))
    assert (target.available, target.host, target.here) == (9 * GIB, 20 * GIB, True)
    assert 2.5 * GIB < target.closable < 3 * GIB
