"""The stub of the native module is the one that the module gives."""

import subprocess
import sys
from pathlib import Path

from conftest import NEEDS_NATIVE, ROOT


@NEEDS_NATIVE
def test_the_stub_is_current(tmp_path: Path) -> None:
    made = tmp_path / "_native.pyi"
    stubgen = ("nanobind.stubgen", "--quiet", "--module", "owl2.runtime._native", "--output-file", str(made))
    subprocess.run([sys.executable, "-m", *stubgen], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(made)], check=True, cwd=ROOT)
    assert made.read_text() == (ROOT / "runtime" / "_native.pyi").read_text(), "run stubgen and ruff format on it"
