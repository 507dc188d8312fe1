"""Engines built by the real TensorRT for RTX, which needs no GPU for that; nothing here runs one."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from owl2.export.job.progress import Silent
from owl2.export.tensorrt.build import build_engine
from owl2.export.tensorrt.profiles import Limits, Profile, decoder_profiles, vision_profile
from owl2.runtime import spec
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import ExportError

pytestmark = pytest.mark.slow

trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 only")

CAPABILITIES = (80, 86, 89, 120)


class Steps(Silent):
    """Counts the steps that a user would see."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}
        self.steps = 0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.stages[name] = total

    def advance(self) -> None:
        self.steps += 1


@pytest.mark.parametrize("compute", CAPABILITIES)
def test_tensorrt_builds_both_graphs_for_every_generation(folder: Path, tmp_path: Path, compute: int) -> None:
    model, limits = Bundle.open(folder).manifest.model, Limits(context=1024, prefill=256, images=2)
    graphs = {spec.VISION_GRAPH: (vision_profile(model, limits),), spec.DECODER_GRAPH: decoder_profiles(model, limits)}
    for name, profiles in graphs.items():
        steps = Steps()
        built = build_engine(trt, folder / name, tmp_path / name, profiles, steps, compute=compute)
        weights = (folder / f"{name}.data").stat().st_size
        assert built.size == (tmp_path / name).stat().st_size > 0.9 * weights
        assert steps.stages
        assert steps.steps > 0


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
        build_engine(trt, graph, tmp_path / "engine", profiles, Silent(), compute=86)
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
    profile: Profile = {"x": ((1, 5), (1, 5), (2, 5))}
    with pytest.raises(ExportError, match=r"could not build an engine of .*g\.onnx: .+"):
        build_engine(trt, tmp_path / "g.onnx", tmp_path / "engine", [profile], Silent(), compute=86)
