"""A session runs on the device that was asked for, or is refused."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort
import pytest
from click.testing import CliRunner

from owl2 import BackendError, Owl2
from owl2.export.config import ExportConfig
from owl2.export.pipeline import export_bundle
from owl2.runtime.__main__ import cli
from owl2.runtime.backends.ort.engine import open_decoder
from owl2.runtime.backends.ort.installation import MINIMUM_VERSIONS, onnxruntime_wheels, overlap
from owl2.runtime.backends.ort.session import (
    SHAPE_OPERATORS,
    OrtOptions,
    assignments,
    check_assignments,
    open_session,
    prepare_device,
    strays,
)
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import BackendUnavailableError, Owl2Warning
from owl2.runtime.placement import Placement

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
MIXED = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
MENDED = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'owl2[{}]'"

pytestmark = pytest.mark.skipif(
    list(onnxruntime_wheels()) != ["onnxruntime"], reason="the messages are those of the wheel for CPUs"
)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if two wheels were installed; devices that were prepared before are prepared anew, and again afterwards."""
    monkeypatch.setattr("owl2.runtime.backends.ort.installation.onnxruntime_wheels", lambda: MIXED)
    prepare_device.cache_clear()
    yield
    prepare_device.cache_clear()


@pytest.fixture(scope="module")
def session(sample_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    """An int4 decoder on the CPU, which tells where its nodes are."""
    bundle = tmp_path_factory.mktemp("int4") / "bundle"
    export_bundle(ExportConfig(sample_checkpoint, bundle, method="rtn", samples=4))
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return ort.InferenceSession(bundle / "decoder.onnx", settings, providers=[CPU])


class TestWhatIsMissing:
    def test_cuda_with_the_wheel_for_cpus(self, bundle_a1: Path) -> None:
        expected = (
            f"device cuda:1 cannot be used: the installed onnxruntime {ort.__version__} has only "
            f"{', '.join(ort.get_available_providers())}, not CUDAExecutionProvider: pip uninstall -y onnxruntime; "
            "pip install 'owl2[cuda]'"
        )
        with pytest.raises(BackendUnavailableError, match=f"^{re.escape(expected)}$"):
            Owl2.load(bundle_a1, device="cuda:1")

    def test_tensorrt_rtx_without_its_plugin(self, bundle_a1: Path) -> None:
        with pytest.raises(
            BackendUnavailableError, match=r"plugin .* not installed: pip install 'owl2\[tensorrt-rtx\]'"
        ):
            Owl2.load(bundle_a1, device="tensorrt-rtx")

    def test_an_onnxruntime_that_cannot_allocate_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(MINIMUM_VERSIONS, "tensorrt-rtx", "99.1")
        with pytest.raises(
            BackendUnavailableError,
            match=rf"onnxruntime {re.escape(ort.__version__)} is installed, 99\.1 or newer .* install -U onnxruntime$",
        ):
            prepare_device(Placement("tensorrt-rtx", 2))

    @pytest.mark.parametrize("command", [("ask", "Why?"), ("verify",)])
    def test_the_commands_say_it_in_one_line(self, bundle_a1: Path, command: tuple[str, ...]) -> None:
        name, *others = command
        result = CliRunner().invoke(cli, [name, str(bundle_a1), *others, "--device", "cuda"], prog_name="owl2")
        assert result.exit_code == 1
        assert result.stderr.startswith("owl2: error: device cuda cannot be used: ")
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""


@pytest.mark.usefixtures("mixed")
class TestTwoWheels:
    def test_a_gpu_is_refused(self) -> None:
        with pytest.raises(BackendUnavailableError, match=re.escape(MENDED.format("cuda"))):
            prepare_device(Placement("cuda"))

    def test_the_cpu_is_warned_of(self) -> None:
        with pytest.warns(Owl2Warning, match=re.escape(MENDED.format("cpu"))):
            prepare_device(Placement("cpu"))

    def test_the_commands_write_the_warning_as_a_line_and_go_on(self, bundle_a1: Path) -> None:
        result = CliRunner().invoke(cli, ["verify", str(bundle_a1)], prog_name="owl2")
        assert result.exit_code == 0
        assert result.stderr == f"owl2: warning: {overlap(MIXED, 'cpu')}\n"


class TestPlacement:
    def test_graphs_for_tensorrt_stay_on_the_cpu(self, bundle_a1: Path) -> None:
        manifest = replace(Bundle.open(bundle_a1).manifest, dialect="onnx")
        with pytest.raises(
            BackendError, match=r"dialect onnx on the CPU only, .* device cuda:1 export .* --dialect ort"
        ):
            open_decoder(bundle_a1 / "decoder.onnx", manifest, OrtOptions(Placement("cuda", 1)))

    def test_nodes_that_compute_count_and_shapes_do_not(self) -> None:
        assigned = [(CUDA, "MatMul"), (CPU, "Shape"), (CPU, "Concat"), (CPU, "GroupQueryAttention"), (CPU, "Conv")]
        assert strays([*assigned, (CPU, "Conv")], CUDA) == Counter({"Conv": 2, "GroupQueryAttention": 1})
        assert strays(assigned[:3], CUDA) == Counter()

    def test_a_decoder_leaves_only_shapes_aside(self, session: ort.InferenceSession) -> None:
        nodes = assignments(session)
        assert strays(nodes, CPU) == Counter()
        elsewhere = strays(nodes, CUDA)
        assert elsewhere["MatMulNBits"] > 20
        assert elsewhere["GroupQueryAttention"] == 5
        assert set(elsewhere) & SHAPE_OPERATORS == set()

    def test_a_provider_that_fell_out(self, session: ort.InferenceSession) -> None:
        with pytest.raises(
            BackendUnavailableError,
            match="did not start CUDAExecutionProvider and would have used CPUExecutionProvider",
        ):
            check_assignments(Path("decoder.onnx"), Placement("cuda"), session.get_providers(), assignments(session))

    def test_a_provider_that_left_nodes_to_another(self, session: ort.InferenceSession) -> None:
        """As if CUDA had only what follows the first 100 nodes."""
        nodes = assignments(session)
        nodes[100:] = [(CUDA, operator) for _, operator in nodes[100:]]
        count = sum(operator not in SHAPE_OPERATORS for _, operator in nodes[:100])
        with pytest.raises(
            BackendError,
            match=rf"{count} of {len(nodes)} nodes would run on the CPU and not on cuda: MatMulNBits \(\d+\), .* and "
            r"\d other operators; .* --activations fp16",
        ):
            check_assignments(Path("decoder.onnx"), Placement("cuda"), [CUDA, CPU], nodes)

    def test_a_provider_that_has_all_but_shapes(self, session: ort.InferenceSession) -> None:
        nodes = [(CPU if operator in ("Shape", "Concat") else CUDA, operator) for _, operator in assignments(session)]
        check_assignments(Path("decoder.onnx"), Placement("cuda"), [CUDA, CPU], nodes)

    def test_nothing_falls_back_to_the_cpu_by_printing(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """The Python class of ONNX Runtime would print to stdout, and try again on the CPU."""
        (tmp_path / "bad.onnx").write_bytes(b"no graph")
        with pytest.raises(BackendError, match="cannot be loaded"):
            open_session(tmp_path / "bad.onnx", OrtOptions())
        assert capfd.readouterr().out == ""
