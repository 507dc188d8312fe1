"""Layers on another device: nothing there meets a tensor of the CPU, and the result is the same.

No GPU is needed: tensors of the other device are CPU tensors in a wrapper that computes with them and refuses to be
mixed with others, as a GPU's would be.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeCheckpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from owl2.export import decoder
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.config import ExportConfig
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.ort_dialect import OrtDialect
from owl2.export.job.device import check_device
from owl2.export.job.job import ExportJob
from owl2.export.job.progress import Silent
from owl2.export.job.staging import Staging
from owl2.export.job.usage import Usage
from owl2.export.prompts import Prompts
from owl2.export.streams import Streams
from owl2.quant.kv import RoundedStream
from owl2.quant.stream import Calibration, HiddenStates, Stream
from owl2.runtime.errors import ConfigError

pytestmark = pytest.mark.slow

ELSEWHERE = torch.device("lazy", 0)  # a type that torch does not try to start up
aten = torch.ops.aten
# These take tensors of two devices on purpose; indices may be on the CPU.
MOVES = (aten._to_copy.default, aten.copy_.default, aten.index.Tensor)
MATH_ATTENTION = 0


class Remote(torch.Tensor):
    """A tensor that claims to be elsewhere."""

    content: torch.Tensor

    @staticmethod
    def __new__(cls: type[Remote], content: torch.Tensor) -> Remote:
        remote = torch.Tensor._make_wrapper_subclass(
            cls, content.size(), strides=content.stride(), dtype=content.dtype, device=ELSEWHERE
        )
        remote.content = content
        return remote

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a method of instances
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes factories with the device of :class:`Remote` work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._fused_sdp_choice.default:
        return MATH_ATTENTION
    leaves = tree_leaves((args, kwargs))
    remote = any(isinstance(leaf, Remote) for leaf in leaves)
    local = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Remote) and leaf.ndim]
    if remote and local and func not in MOVES:
        raise RuntimeError(f"{func}: tensors of two devices")
    device = kwargs.get("device")
    if device is not None:
        remote = torch.device(device).type == ELSEWHERE.type
        kwargs = kwargs | {"device": "cpu" if remote else device}
    result = func(*tree_map(content_of, args), **tree_map(content_of, kwargs))
    if func._schema.is_mutable:
        return args[0]
    return tree_map(lambda x: Remote(x) if isinstance(x, torch.Tensor) else x, result) if remote else result


def content_of(value: Any) -> Any:
    return value.content if isinstance(value, Remote) else value


def test_the_wrapper_notices_a_mixture() -> None:
    with Elsewhere(), torch.no_grad():
        there = torch.ones(2, 2, device=ELSEWHERE)
        assert (there + there).cpu().sum() == 8
        with pytest.raises(RuntimeError, match="two devices"):
            there @ torch.ones(2, 2)
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()


def exported(checkpoint: Checkpoint, folder: Path, device: str, **settings: Any) -> tuple[bytes, list[torch.Tensor]]:
    """The first layer's file, and all rows after it."""
    folder.mkdir()
    config = ExportConfig(checkpoint.folder, folder / "bundle", group_size=32, **settings)
    object.__setattr__(config, "device", device)  # a name that users cannot give
    shape = checkpoint.config.decoder
    generator = torch.Generator().manual_seed(5)
    kinds = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    rows = [torch.randn(len(kinds), shape.hidden_size, generator=generator) for _ in range(8)]

    def stream() -> Stream:
        return Stream(shape, [HiddenStates.of(row, kinds) for row in rows])

    calibration = Calibration(stream()) if config.method == "gptq" and config.quant else None
    streams = Streams(calibration, stream(), stream(), RoundedStream(stream()))
    with GraphBuilder(folder / "graph") as graph:
        staging = Staging(config.bundle, overwrite=False)
        job = ExportJob(config, checkpoint, Prompts([], [], [], {}, "none"), staging, Usage(), Silent())
        decoder.export_layer(job, DecoderGraph(OrtDialect(graph), shape), streams, 0)
        graph.state()
    return (folder / "graph.data").read_bytes(), [s.rows for s in streams._sequences()]


@pytest.mark.parametrize(("weights", "method"), [("int4", "gptq"), ("int8", "rtn"), ("fp16", "rtn")])
def test_a_layer_is_quantized_there_and_comes_back(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, method: str
) -> None:
    # By default torch would put the wrapper's outside into the parameters that a module has.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with (
        Checkpoint(make_checkpoint(top={"attention_bias": True, "num_hidden_layers": 1})) as checkpoint,
        sdpa_kernel(SDPBackend.MATH),  # the one that the wrapper goes through; others sum in another order
    ):
        here, expected = exported(checkpoint, tmp_path / "here", "cpu", weights=weights, method=method)
        with Elsewhere():
            there, rows = exported(checkpoint, tmp_path / "there", str(ELSEWHERE), weights=weights, method=method)
    assert not any(isinstance(row, Remote) for row in rows)
    for one, other in zip(rows, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert there == here


def test_a_device_that_torch_cannot_use() -> None:
    assert check_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=rf"device cuda:1: .*torch {re.escape(torch.__version__)}"):
            check_device("cuda:1")
