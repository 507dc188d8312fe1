"""What a graph says about other files: found wherever it is, and nothing but the listed file is allowed."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import rehash
from onnx import GraphProto, ModelProto, TensorProto, helper

from owl2 import Owl2
from owl2.runtime.bundle import check_files, read_manifest
from owl2.runtime.errors import BackendError, BundleCorruptError
from owl2.runtime.foreign import ForeignError
from owl2.runtime.graph_file import external_tensors, graph_problems

DATA = "decoder.onnx.data"


def external(location: str = DATA, **entries: object) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": location, "offset": 8, "length": 24} | entries).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph(*nodes: onnx.NodeProto, **parts: Any) -> GraphProto:
    return GraphProto(name="g", node=nodes, **parts)


def with_attribute(value: object) -> onnx.NodeProto:
    node = helper.make_node("Any", [], ["y"])
    node.attribute.append(helper.make_attribute("a", value))
    return node


def sparse() -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=external(), indices=external(), dims=[4])


def in_functions() -> ModelProto:
    model = ModelProto(graph=graph())
    model.functions.add(name="f", node=[with_attribute(external())])
    return model


def in_training() -> ModelProto:
    model = ModelProto(graph=graph())
    model.training_info.add(algorithm=graph(initializer=[external()]))
    return model


PLACES: dict[str, Callable[[], ModelProto]] = {
    "initializer": lambda: ModelProto(graph=graph(initializer=[external()])),
    "sparse": lambda: ModelProto(graph=graph(sparse_initializer=[sparse()])),
    "attribute": lambda: ModelProto(graph=graph(with_attribute(external()))),
    "attributes": lambda: ModelProto(graph=graph(with_attribute([external(), external()]))),
    "sparse attribute": lambda: ModelProto(graph=graph(with_attribute(sparse()))),
    "subgraph": lambda: ModelProto(graph=graph(with_attribute(graph(initializer=[external()])))),
    "subgraphs": lambda: ModelProto(
        graph=graph(with_attribute([graph(), graph(with_attribute(graph(initializer=[external()])))]))
    ),
    "function": in_functions,
    "training": in_training,
}


@pytest.mark.parametrize("place", PLACES)
def test_found_wherever_it_is(place: str, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    path.write_bytes(PLACES[place]().SerializeToString())
    found = external_tensors(path)
    assert found
    for tensor in found:
        assert (tensor.name, tensor.element, tensor.shape) == ("w", TensorProto.FLOAT, (2, 3))
        assert (tensor.location, tensor.offset, tensor.length) == (DATA, 8, 24)
        assert tensor.initializer == (place == "initializer")
    assert graph_problems(path, DATA, 32) == []
    assert graph_problems(path, DATA, 31) == ["decoder.onnx takes 'w' from beyond the 31 bytes of decoder.onnx.data"]
    assert graph_problems(path, "vision.onnx.data", 32) == [
        "decoder.onnx takes 'w' from 'decoder.onnx.data' instead of vision.onnx.data"
    ]


@pytest.mark.parametrize("name", ["decoder.onnx", "vision.onnx"])
def test_as_the_onnx_package_reads_it(bundle_a1: Path, name: str) -> None:
    expected = [
        (tensor.name, tuple(tensor.dims), {entry.key: entry.value for entry in tensor.external_data})
        for tensor in onnx.load(bundle_a1 / name, load_external_data=False).graph.initializer
        if tensor.external_data
    ]
    found = [
        (t.name, t.shape, {"location": t.location, "offset": str(t.offset), "length": str(t.length)})
        for t in external_tensors(bundle_a1 / name)
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (external("../decoder.onnx.data"), "'../decoder.onnx.data' instead of"),
        (external("/etc/passwd"), "'/etc/passwd' instead of"),
        (external("embeddings.bin"), "'embeddings.bin' instead of"),
        (external("*/_ORT_MEM_ADDR_/*"), "instead of decoder.onnx.data"),
        (external(offset=-8), "has the offset or length '-8'"),
        (external(length="9" * 17), "has the offset or length '9+"),
        (external(length=""), "has the offset or length ''"),
        (external(offset="٣"), "has the offset or length"),
        (external(offset=1 << 40), "from beyond the"),
        (external(prepacked_0="w|0;24"), "has the keys"),
        (TensorProto(external_data=[{"key": "location", "value": DATA}]), "has the keys"),
        (TensorProto(external_data=2 * [{"key": "location", "value": DATA}]), "has 'location' twice"),
    ],
)
def test_what_is_refused_before_a_backend_sees_it(copy: Path, tensor: TensorProto, message: str) -> None:
    """Hidden in a subgraph that nothing runs, and the hashes are right."""
    model = onnx.load(copy / "decoder.onnx", load_external_data=False)
    model.graph.node.insert(0, with_attribute(graph(initializer=[tensor])))
    (copy / "decoder.onnx").write_bytes(model.SerializeToString())
    rehash(copy, "decoder.onnx")
    (problem,) = check_files(copy, read_manifest(copy))
    assert problem.startswith("decoder.onnx ")
    with pytest.raises(BundleCorruptError, match=message):
        Owl2.load(copy)


def test_operators_that_load_files(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(ModelProto(graph=graph(helper.make_node("EPContext", [], ["y"]))).SerializeToString())
    assert graph_problems(path, DATA, 1) == [
        "a.onnx cannot be read as a graph: it has the operator EPContext, which loads other files"
    ]


def nested(depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            size = len(content)
            content = tag + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + content
    return b"\x3a" + bytes([len(content) & 0x7F | 0x80, len(content) >> 7 & 0x7F | 0x80, len(content) >> 14]) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x3a\xff\xff\xff\xff\x0f", "not a complete"),
        (b"\xff" * 20, "not a complete"),
        (b"\x3b\x3c", "not a complete"),  # groups, which ONNX has none of
        (b"\x00\x01", "not a complete"),
        (b"\x3d\x00", "not a complete"),
        (nested(200), "nested too deeply"),
        (b"\x08\x01" * (1 << 20) + b"\x08\x01", "more than 1048576 fields"),
        (bytes((16 << 20) + 1), "at most 16777216 are read"),
    ],
)
def test_hostile_bytes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ForeignError, match=message):
        external_tensors(path)


def test_damage_never_raises_anything_else(bundle_a1: Path, tmp_path: Path) -> None:
    whole, rng, path = (bundle_a1 / "decoder.onnx").read_bytes(), random.Random(1), tmp_path / "decoder.onnx"
    for _ in range(200):
        content = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256) if content else 0
        path.write_bytes(content)
        assert len(graph_problems(path, DATA, 10**9)) <= 1


def swapped_kv_graph(bundle: Path) -> None:
    (bundle / "decoder.onnx").write_bytes((bundle / "decoder.kv_int8.onnx").read_bytes())


def half_inputs(bundle: Path) -> None:
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    (embeds,) = (value for value in model.graph.input if value.name == "inputs_embeds")
    embeds.type.tensor_type.elem_type = TensorProto.FLOAT16
    cast = helper.make_node("Cast", ["inputs_embeds"], ["wide"], to=TensorProto.FLOAT)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "inputs_embeds":
                node.input[index] = "wide"
    model.graph.node.insert(0, cast)
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped_kv_graph, r"past_key_values.0.key is tensor\(int8\), fp32 is needed"),
        (half_inputs, r"inputs_embeds is tensor\(float16\), fp32 is needed"),
    ],
)
def test_types_are_compared_where_none_was_asked_for(copy: Path, change: Callable[[Path], None], message: str) -> None:
    change(copy)
    rehash(copy, "decoder.onnx")
    with pytest.raises(BackendError, match=message):
        Owl2.load(copy, backend="onnxruntime")
