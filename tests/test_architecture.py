"""Who may import whom: the runtime stands alone, without torch; the public names are what they say."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from isolation import BLOCKED

import owl2.runtime

RUNTIME_MODULES = {"numpy", "onnxruntime", "PIL", "click", "sentencepiece", "owl2", "typing_extensions"}


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_runtime_imports_its_few_dependencies_only(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top in RUNTIME_MODULES, name
        assert not name.startswith(("owl2.export", "owl2.quant")), name


SCRIPTS = sorted(path for folder in ("scripts", "sample") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_import_what_is_there(path: Path) -> None:
    """Names of this project that scripts take, which no test runs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("owl2"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_runtime_answers_without_torch(bundle_a1: Path, golden: Path) -> None:
    """A real answer about an image in a process where torch and the exporter cannot be imported."""
    image = golden / "images" / "00_rgb_landscape_97x61.png"
    script = BLOCKED + (
        "from owl2.runtime.__main__ import main\n"
        f"sys.argv = ['owl2', 'ask', {str(bundle_a1)!r}, 'What is it?', '--image', {str(image)!r}, "
        "'--max-new-tokens', '5']\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=os.sep, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_importing_has_no_side_effects() -> None:
    """No environment edits, no logging configuration, no threads."""
    script = (
        "import os, logging, threading; before = dict(os.environ), threading.active_count()\n"
        "import owl2.runtime\n"
        "assert (dict(os.environ), threading.active_count()) == before\n"
        "assert not logging.getLogger().handlers\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_public_names() -> None:
    assert owl2.runtime.__all__ == sorted(owl2.runtime.__all__)
    for name in owl2.runtime.__all__:
        assert getattr(owl2.runtime, name).__doc__ or name == "__version__"
