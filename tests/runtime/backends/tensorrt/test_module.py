"""The module of TensorRT: what is said where it is missing, and its messages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_tensorrt import FakeGpu, FakeTensorRt, ILogger

from owl2 import BackendUnavailableError
from owl2.runtime.backends.tensorrt.module import MODULES, Messages, import_tensorrt, one_line
from owl2.runtime.placement import EngineKind


@pytest.mark.parametrize(("kind", "hint"), [("tensorrt", "--system-site-packages"), ("tensorrt-rtx", "pip install")])
def test_a_module_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, kind: EngineKind, hint: str) -> None:
    monkeypatch.setitem(sys.modules, MODULES[kind], None)
    with pytest.raises(BackendUnavailableError, match=rf"module {MODULES[kind]} is not installed; .*{hint}"):
        import_tensorrt(kind)


@pytest.mark.parametrize("line", ["raise OSError('libnvinfer.so.10: cannot open')", "import libs_of_tensorrt"])
def test_a_module_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    (tmp_path / "tensorrt.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"module tensorrt cannot be imported \(.*\); on a Jetson"):
        import_tensorrt("tensorrt")


class TestMessages:
    def test_errors_are_kept_on_one_line_each_once(self) -> None:
        messages = Messages()
        logger = messages.logger(FakeTensorRt(FakeGpu()))
        for severity, text in ((1, "a\n  b"), (2, "a warning"), (0, "c"), (1, "a b"), (3, "and more")):
            logger.log(severity, text)
        assert messages.take() == "a b; c"
        assert messages.take() == "TensorRT gave no reason"
        logger.log(ILogger.ERROR, "before")
        messages.clear()
        assert messages.take() == "TensorRT gave no reason"

    def test_many_are_counted(self) -> None:
        assert one_line([str(i) for i in range(8)]) == "0; 1; 2; 3; 4 (and 3 more)"

    def test_of_the_real_one_come_with_the_error(self, tmp_path: Path) -> None:
        """Without a GPU, a runtime can be made, and refuses with reasons. In a process of its own, lest it crash."""
        pytest.importorskip("tensorrt_rtx", reason="there is no wheel here")
        (tmp_path / "decoder.engine").write_bytes(b"abc" * 1000)
        script = (
            "import pathlib, tensorrt_rtx as trt\n"
            "from owl2.runtime.backends.tensorrt.context import load_engine\n"
            "from owl2.runtime.backends.tensorrt.module import Messages\n"
            "from owl2.runtime.errors import BackendError\n"
            "messages = Messages(); logger = messages.logger(trt)\n"
            "try:\n"
            f"    load_engine(trt.Runtime(logger), pathlib.Path({str(tmp_path / 'decoder.engine')!r}), messages)\n"
            "except BackendError as error:\n    print(error)\n"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert (result.returncode, result.stderr) == (0, "")
        assert re.search(r"decoder\.engine cannot be loaded: .*magicTag", result.stdout)
