"""Engines built by the real TensorRT for RTX, which needs no GPU for that; nothing here runs one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from owl2 import ConfigError, Owl2
from owl2.export.__main__ import cli
from owl2.export.config import ExportConfig
from owl2.export.job.progress import Silent
from owl2.export.pipeline import export_bundle
from owl2.export.tensorrt.build import Job, build_engine
from owl2.export.tensorrt.cli import engine as command
from owl2.export.tensorrt.folder import build_engines
from owl2.export.tensorrt.profiles import Limits, decoder_profiles, vision_profile
from owl2.export.tensorrt.target import choose, find_gpu, table
from owl2.runtime import spec
from owl2.runtime.backends.tensorrt import records
from owl2.runtime.backends.tensorrt.records import EngineRecord
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import BackendUnavailableError, ExportError
from owl2.runtime.fit.products import PRODUCTS
from owl2.runtime.verification import hash_file

pytestmark = pytest.mark.slow

trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 only")

CAPABILITIES = (80, 86, 89, 120)


class Steps(Silent):
    """Counts what the user would see."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}
        self.steps = 0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.stages[name] = total

    def advance(self) -> None:
        self.steps += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_checkpoint: Path) -> Path:
    """The sample model for TensorRT: int4 decoder, fp16 elsewhere."""
    target = tmp_path_factory.mktemp("engines") / "bundle"
    export_bundle(ExportConfig(sample_checkpoint, target, method="rtn", dialect="onnx", samples=4))
    return target


@pytest.mark.parametrize("compute", CAPABILITIES)
def test_tensorrt_builds_both_graphs_for_every_generation(folder: Path, tmp_path: Path, compute: int) -> None:
    model, limits = Bundle.open(folder).manifest.model, Limits(context=1024, prefill=256, images=2)
    graphs = {spec.VISION_GRAPH: (vision_profile(model, limits),), spec.DECODER_GRAPH: decoder_profiles(model, limits)}
    for name, profiles in graphs.items():
        steps = Steps()
        built = build_engine(trt, Job(folder / name, tmp_path / name, profiles, compute, None), steps)
        weights = (folder / f"{name}.data").stat().st_size
        assert built.size == (tmp_path / name).stat().st_size > 0.9 * weights
        assert steps.stages
        assert steps.steps > 0


class TestBundle:
    def test_engines_are_stamped_and_listed(self, folder: Path) -> None:
        bundle, limits = Bundle.open(folder), Limits(512, 128, 1)
        device, here = find_gpu("rtx4060")
        target = choose("tensorrt-rtx", device, "onnx", "int4", here=here)
        report = build_engines(bundle, target, limits, 256 << 20, Silent())
        assert report.folder == folder / "engines" / "tensorrt-rtx-sm89"
        record = EngineRecord.from_json(json.loads((report.folder / "engine.json").read_text()))
        assert record == report.record
        assert (record.kind, record.tensorrt) == ("tensorrt-rtx", trt.__version__)
        assert (record.compute_capability, record.gpu, record.driver) == ((8, 9), None, None)
        assert (record.context, record.prefill, record.images) == (512, 128, 1)
        for name, entry in record.files.items():
            assert (entry.size, entry.sha256) == (
                (report.folder / name).stat().st_size,
                hash_file(report.folder / name),
            )
        for name, sha256 in record.source.items():
            assert sha256 == hash_file(folder / name)
        manifest = Bundle.open(folder).manifest
        assert manifest.engines == {"tensorrt-rtx-sm89": hash_file(report.folder / "engine.json")}
        assert replace(manifest, engines={}) == bundle.manifest
        shown = subprocess.run(
            [sys.executable, "-m", "owl2.runtime", "info", str(folder)], check=False, capture_output=True, text=True
        )
        assert "tensorrt-rtx-sm89" in shown.stdout
        assert f"TensorRT {trt.__version__}, built without a GPU; 512 positions, 128 in a step" in shown.stdout
        (report.folder / records.VISION_ENGINE).write_bytes(b"cut")
        shown = subprocess.run(
            [sys.executable, "-m", "owl2.runtime", "info", str(folder)], check=False, capture_output=True, text=True
        )
        assert shown.returncode == 1
        assert "tensorrt-rtx-sm89: vision.engine has 3 bytes" in shown.stdout
        assert Owl2.load(folder).logits("Hi").shape[1] == manifest.model.decoder.vocab_size

    def test_a_failure_leaves_engines_and_manifest_as_they_were(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device, here = find_gpu("sm86")
        target = choose("tensorrt-rtx", device, "onnx", "int4", here=here)
        before, listed = (folder / spec.MANIFEST).read_bytes(), sorted((folder / "engines").iterdir())
        monkeypatch.setattr("owl2.export.tensorrt.folder._record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent())
        assert (folder / spec.MANIFEST).read_bytes() == before
        assert sorted((folder / "engines").iterdir()) == listed

    def test_a_full_disk_at_the_last_moment_brings_the_former_engines_back(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = choose("tensorrt-rtx", find_gpu("sm89")[0], "onnx", "int4", here=False)
        made = build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent()).folder
        before = {path: path.read_bytes() for path in (*made.iterdir(), folder / spec.MANIFEST)}
        rename = Path.rename

        def full(self: Path, target: Path) -> Path:
            if target.name == spec.MANIFEST:
                raise OSError(28, "No space left on device")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", full)
        with pytest.raises(ExportError, match="cannot be written: No space left on device"):
            build_engines(Bundle.open(folder), target, Limits(256, 64, 1), None, Silent())
        assert {path: path.read_bytes() for path in before} == before
        assert not [path.name for path in made.parent.iterdir() if path.name.startswith(".")]
        assert not list(folder.glob("*.new"))

    def test_engines_that_a_kill_left_aside_come_back(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = choose("tensorrt-rtx", find_gpu("sm89")[0], "onnx", "int4", here=False)
        made = build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent()).folder
        made.rename(made.with_name(f".{made.name}.former"))
        monkeypatch.setattr("owl2.export.tensorrt.folder.build_engine", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_engines(Bundle.open(folder), target, Limits(512, 128, 1), None, Silent())
        assert (made / records.DECODER_ENGINE).is_file()
        assert not made.with_name(f".{made.name}.former").exists()

    def test_ctrl_c_leaves_nothing(self, folder: Path) -> None:
        arguments = ["engine", str(folder), "--gpu", "rtx5090", "--context", "777"]
        process = subprocess.Popen([sys.executable, "-m", "owl2.export", *arguments], stderr=subprocess.PIPE, text=True)
        work = folder / "engines" / ".tensorrt-rtx-sm120.partial"
        while not work.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130, said
        assert said.splitlines()[-1].endswith("stopped")
        assert not work.exists()
        assert not (folder / "engines" / "tensorrt-rtx-sm120").exists()


def planted(folder: Path, target: Path, change: str) -> Path:
    """The decoder graph with one operator that TensorRT does not take."""
    model = onnx.load(folder / spec.DECODER_GRAPH, load_external_data=False)
    graph = model.graph
    if change == "unknown operator":
        graph.node[-1].op_type, graph.node[-1].domain = "QuickGelu", "com.microsoft"
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    else:
        graph.node.insert(0, helper.make_node("NonZero", [spec.MODALITY], ["planted"], name="planted"))
        graph.node.insert(1, helper.make_node("Squeeze", ["planted"], ["planted_rows"]))
        for node in graph.node:
            node.input[:] = ["planted_rows" if name == spec.IMAGE_ROW_INDEX else name for name in node.input]
        rows = next(value for value in graph.input if value.name == spec.IMAGE_ROW_INDEX)
        graph.input.remove(rows)
    target.mkdir()
    (target / f"{spec.DECODER_GRAPH}.data").symlink_to(folder / f"{spec.DECODER_GRAPH}.data")
    (target / spec.DECODER_GRAPH).write_bytes(model.SerializeToString())
    return target / spec.DECODER_GRAPH


@pytest.mark.parametrize(
    ("change", "message"),
    [("unknown operator", "QuickGelu"), ("routing by NonZero", r"does not take .*node planted \(NonZero\)")],
)
def test_a_graph_that_tensorrt_does_not_take_is_named(folder: Path, tmp_path: Path, change: str, message: str) -> None:
    graph = planted(folder, tmp_path / "planted", change)
    inputs = {value.name for value in onnx.load(graph, load_external_data=False).graph.input}
    whole = decoder_profiles(Bundle.open(folder).manifest.model, Limits(512, 128, 1))
    profiles = [{name: shape for name, shape in shapes.items() if name in inputs} for shapes in whole]
    with pytest.raises(ExportError, match=message):
        build_engine(trt, Job(graph, tmp_path / "engine", profiles, 86, None), Silent())
    assert not (tmp_path / "engine").exists()


def test_what_only_the_builder_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    """A shape outside of the profile's own limits."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    job = Job(tmp_path / "g.onnx", tmp_path / "engine", [{"x": ((1, 5), (1, 5), (2, 5))}], 86, None)
    with pytest.raises(ExportError, match=r"could not build an engine of .*g\.onnx: .+"):
        build_engine(trt, job, Silent())


class TestTarget:
    @pytest.mark.parametrize(
        ("kind", "gpu", "weights", "message"),
        [
            ("tensorrt-rtx", "rtx2080ti", "int4", "SM75.*need compute capability 8.0.*--weights fp16"),
            ("tensorrt-rtx", "agx-orin-64gb", "int4", "does not run tensorrt-rtx engines; it runs tensorrt engines"),
            ("tensorrt-rtx", "h100", "int4", "SM90.*does not run tensorrt-rtx engines; it runs tensorrt engines"),
            ("tensorrt", "rtx3060", "int4", "does not run tensorrt engines; it runs tensorrt-rtx engines"),
            (
                "tensorrt",
                "agx-orin-64gb",
                "int4",
                "built on the GPU that runs them: copy the bundle to",
            ),
            ("tensorrt-rtx", "rtx9999", "int4", "'rtx9999' is not known; known: .*rtx3060"),
            ("tensorrt-rtx", "sm42", "int4", "'sm42' is not known; known: sm75, sm80, sm86"),
        ],
    )
    def test_a_gpu_that_cannot_have_them_is_refused(self, kind: str, gpu: str, weights: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            choose(kind, find_gpu(gpu)[0], "onnx", weights, here=False)

    def test_turing_may_have_float16(self) -> None:
        device, here = find_gpu("rtx2080ti")
        assert choose("tensorrt-rtx", device, "onnx", "fp16", here=here).compute == 75

    def test_graphs_of_the_other_dialect_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="--dialect onnx"):
            choose("tensorrt-rtx", PRODUCTS["rtx3060"], "ort", "int4", here=False)

    def test_a_module_that_is_missing_is_named_with_what_brings_it(self) -> None:
        orin = PRODUCTS["agx-orin-64gb"]
        with pytest.raises(
            BackendUnavailableError, match="tensorrt is not installed; on a Jetson it comes with JetPack"
        ):
            choose("tensorrt", orin, "onnx", "int4", here=True)

    def test_every_gpu_is_listed(self) -> None:
        shown = table()
        assert all(name in shown for name in PRODUCTS)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [((0, 1, 1), "context must be positive"), ((64, 65, 1), "65 positions does not fit a context of 64")],
    )
    def test_limits(self, settings: tuple[int, int, int], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Limits(*settings)


def test_no_gpu_here_is_said(folder: Path) -> None:
    made = CliRunner().invoke(command, [str(folder)])
    assert made.exit_code == 1
    assert "no NVIDIA GPU is found on this machine" in made.output


def test_it_needs_neither_torch_nor_onnx_nor_an_onnx_runtime(folder: Path) -> None:
    """As on a Jetson with the extra tensorrt alone."""
    blocked = dict.fromkeys(("torch", "onnx", "onnxruntime", "safetensors", "huggingface_hub"))
    run = f"import sys; sys.modules |= {blocked}; from owl2.export.__main__ import main; main()"
    arguments = ["engine", str(folder), "--gpu", "rtx3070", "--context", "256", "--prefill", "64", "--json"]
    made = subprocess.run([sys.executable, "-c", run, *arguments], check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "building the decoder's engine takes about" in made.stderr
    assert json.loads(made.stdout)["engine"]["compute_capability"] == [8, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "gptq", "--gpu", "rtx3060"], "leave --layout gptq out"),
        (["--dialect", "ort", "--engine", "tensorrt-rtx", "--gpu", "rtx3060"], "--dialect onnx, not of ort"),
        (["--layout", "gptq", "--activations", "fp16"], "leave dialect and activations out"),
    ],
)
def test_options_that_exclude_each_other(
    sample_checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    made = CliRunner().invoke(cli, [str(sample_checkpoint), str(tmp_path / "bundle"), *options])
    assert made.exit_code == 1
    assert message in made.output
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_stays_when_its_engines_cannot_be_built(
    sample_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise ExportError("TensorRT could not")

    monkeypatch.setattr("owl2.export.tensorrt.folder.build_engine", refused)
    given = [str(sample_checkpoint), str(tmp_path / "bundle"), "--method", "rtn", "--gpu", "rtx3060", "--samples", "2"]
    made = CliRunner().invoke(cli, given)
    assert made.exit_code == 1
    assert f"owl2-export engine {tmp_path / 'bundle'} --gpu rtx3060" in made.output
    assert "equals torch within" in made.output
    assert Bundle.open(tmp_path / "bundle").manifest.engines == {}


def test_list_shows_all_and_does_nothing_else() -> None:
    made = CliRunner().invoke(command, ["--gpu", "list"])
    assert made.exit_code == 0
    assert "rtx3060" in made.output


def test_json(folder: Path) -> None:
    given = [str(folder), "--gpu", "sm80", "--context", "256", "--prefill", "64", "--json"]
    made = CliRunner().invoke(command, given, catch_exceptions=False)
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["engine"]["compute_capability"] == [8, 0]
    assert set(record["built"]) == {records.DECODER_ENGINE, records.VISION_ENGINE}
