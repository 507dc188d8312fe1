"""The plan of the house: who may import whom, what an import costs, what is public."""

import ast
import importlib
import os
import pickle
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from isolation import BLOCKED

import owl2
from owl2.runtime import errors
from owl2.runtime.backends.native.support import is_installed

RUNTIME_DEPENDENCIES = {
    "anyio", "av", "click", "llguidance", "matplotlib", "numpy", "onnxruntime", "packaging", "PIL", "pillow_heif",
    "platformdirs", "prometheus_client", "psutil", "pyarrow", "sentencepiece", "starlette",
    "typing_extensions", "uvicorn",
}  # fmt: skip
"""Packages that the runtime may import: ``packaging`` comes with ONNX Runtime, ``psutil`` is for Windows,
``matplotlib`` only for a plot, ``pyarrow`` for Parquet, ``av`` for videos, ``llguidance`` for grammars,
``starlette`` with ``anyio``, ``uvicorn`` and ``prometheus_client`` for the server."""

ROOMS = {
    "runtime": "",
    "runtime.families": "runtime",
    "runtime.backends": "runtime runtime.backends.native runtime.backends.ort runtime.backends.tensorrt",
    "runtime.backends.native": "runtime runtime.backends.ort",
    "runtime.backends.ort": "runtime runtime.backends",
    "runtime.backends.tensorrt": "runtime runtime.backends",
    "runtime.fit": "runtime runtime.backends runtime.backends.native",
    "runtime.load": "runtime runtime.families runtime.backends runtime.fit runtime.scoring",
    "runtime.evaluation": "runtime runtime.families runtime.backends.tensorrt runtime.load",
    "runtime.bench": "runtime runtime.families runtime.backends runtime.backends.native runtime.fit runtime.load",
    "runtime.scoring": "runtime runtime.families runtime.load",
    "runtime.serve": "runtime runtime.families runtime.load runtime.scoring",
    "runtime.cli": (
        "runtime runtime.bench runtime.families runtime.backends runtime.backends.native runtime.backends.ort "
        "runtime.backends.tensorrt runtime.fit runtime.load runtime.evaluation runtime.scoring runtime.serve"
    ),
    "quant": "runtime runtime.families runtime.evaluation",
    # The stages in the root call their checks and run within a job; both know the stages' settings and results.
    "export": (
        "quant runtime runtime.families runtime.fit runtime.evaluation runtime.scoring "
        "export.checkpoint export.graph export.checks export.job"
    ),
    "export.checkpoint": "quant runtime runtime.families runtime.load runtime.scoring export",
    "export.graph": "quant runtime",
    "export.checks": (
        "quant runtime runtime.families runtime.backends.ort runtime.evaluation export export.graph export.job"
    ),
    "export.job": "quant runtime runtime.backends.tensorrt runtime.cli export export.checkpoint export.graph",
    "export.tensorrt": "runtime runtime.backends runtime.backends.tensorrt runtime.fit runtime.cli export.job",
    "export.cli": "quant runtime runtime.cli runtime.scoring export export.checkpoint export.job export.tensorrt",
    "export.optimum": "export.cli",
}
"""Each room and those that its modules may import besides itself: the way of the data, read backwards.
Two rooms may name each other, as a folder and its subfolders do; single modules still have no cycle.

``runtime`` is its root without the modules that open backends: these, ``runtime.load`` and what stands on it, count as
``runtime.load`` here.
"""
ON_LOAD = {"likelihood", "load", "steps", "generate", "stream", "messages", "saved_cache", "saved_chat", "chat", "owl"}
"""Modules in the root of the runtime that run a loaded bundle."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the three packages, named as after ``owl2.``, with its file."""
    for package in ("runtime", "quant", "export"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def room(module: str) -> str:
    """The room of a module."""
    package, _, rest = module.partition(".")
    if package == "runtime" and rest in ON_LOAD:
        return "runtime.load"
    if rest == "__main__":
        return f"{package}.cli"
    known = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    return max(known, key=len)


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {name for name in names if name.removeprefix("owl2.") in MODULES}
            found |= inner or {node.module}
    return found


def neighbours(path: Path) -> set[str]:
    """Modules of this project that a file imports."""
    return {name.removeprefix("owl2.") for name in imports(path) if name.startswith("owl2.")}


@pytest.mark.parametrize("module", MODULES)
def test_every_room_imports_only_those_before_it(module: str) -> None:
    home = room(module)
    allowed = {home, *ROOMS[home].split()}
    wrong = {other: room(other) for other in neighbours(MODULES[module]) if room(other) not in allowed}
    assert not wrong, f"{module} ({home}) imports {wrong}; {home} may import {', '.join(sorted(allowed))}"


def test_imports_have_no_cycle() -> None:
    graph = {module: neighbours(path) & set(MODULES) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("runtime")])
def test_the_runtime_imports_its_few_dependencies_only(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(MODULES[module])} - {"owl2"}
    assert tops <= {*sys.stdlib_module_names, *RUNTIME_DEPENDENCIES}


SCRIPTS = sorted(path for folder in ("scripts", "sample") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_import_what_exists(path: Path) -> None:
    """Names of this project that scripts take, which no test runs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("owl2"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def run_python(script: str) -> str:
    """Output of a script in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=os.sep, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_runtime_answers_without_torch(bundle_a1: Path, golden: Path) -> None:
    """A real answer about an image in a process where torch and the exporter cannot be imported."""
    image = golden / "images" / "00_rgb_landscape_97x61.png"
    assert run_python(
        BLOCKED + "from owl2.runtime.__main__ import main\n"
        f"sys.argv = ['owl2', 'ask', {str(bundle_a1)!r}, 'What is it?', '--image', {str(image)!r}, "
        "'--max-new-tokens', '5']\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )


def test_importing_has_no_side_effects() -> None:
    """No environment edits, no logging configuration, no threads."""
    run_python(
        "import os, logging, threading; before = dict(os.environ), threading.active_count()\n"
        "import owl2; owl2.Owl2\n"
        "assert (dict(os.environ), threading.active_count()) == before\n"
        "assert not logging.getLogger().handlers\n"
    )


def test_importing_owl2_imports_nothing_heavy() -> None:
    assert (
        run_python("import owl2, sys; print(sorted({'numpy', 'PIL', 'onnxruntime', 'torch'} & set(sys.modules)))")
        == "[]"
    )
    heavy = "{'onnxruntime', 'torch', 'tensorrt', 'owl2.runtime.fit', 'owl2.runtime.evaluation', 'owl2.runtime.cli'}"
    assert run_python(f"from owl2 import Owl2; import sys; print(sorted({heavy} & set(sys.modules)))") == "[]"
    assert run_python("import owl2.export, sys; print('torch' in sys.modules)") == "False"


POSIX_ONLY = ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")


def test_the_runtime_needs_no_module_that_only_posix_has() -> None:
    """As on Windows, but for what Python itself imports."""
    native = [] if is_installed() else ["runtime.backends.native.engine", "runtime.backends.native.weights"]
    left_out = {"runtime.__main__", *native}
    names = [f"owl2.{module}" for module in MODULES if module.startswith("runtime") and module not in left_out]
    run_python(
        "import importlib, importlib.util, sys\n"
        "import click, numpy, onnxruntime, PIL.Image, platformdirs, sentencepiece, subprocess, concurrent.futures\n"
        f"blocked = {POSIX_ONLY!r}\n"
        "for name in blocked:\n    sys.modules[name] = None\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "import owl2\n"
        "for name in owl2.__all__:\n    getattr(owl2, name)\n"
    )


class TestPublicNames:
    def test_all_of_them_exist_and_are_documented(self) -> None:
        assert owl2.__all__ == sorted(owl2.__all__)
        for name in owl2.__all__:
            assert name == "FinishReason" or getattr(owl2, name).__doc__, name
        assert set(owl2.__all__) <= set(dir(owl2))

    def test_a_type_checker_sees_the_same_names(self) -> None:
        tree = ast.parse((ROOT / "package" / "__init__.py").read_text(encoding="utf-8"))
        (block,) = (node for node in tree.body if isinstance(node, ast.If))
        seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
        assert sorted(seen) == owl2.__all__

    def test_a_name_that_does_not_exist(self) -> None:
        with pytest.raises(AttributeError, match="module 'owl2' has no attribute 'Owl3'"):
            owl2.Owl3  # noqa: B018
        with pytest.raises(ImportError, match="cannot import name 'Owl3'"):
            exec("from owl2 import Owl3")

    def test_subpackages_are_attributes(self) -> None:
        assert run_python("import owl2; print(owl2.export.__name__, owl2.quant.__name__)") == "owl2.export owl2.quant"

    def test_types_can_be_read(self) -> None:
        """Every name in an annotation can be resolved, also outside of type checking."""
        for name in owl2.__all__:
            value = getattr(owl2, name)
            if isinstance(value, type):
                for member in vars(value).values():
                    function = getattr(member, "__func__", member)
                    if callable(function) and not isinstance(function, type):
                        assert isinstance(typing.get_type_hints(function), dict), function


def error_instances() -> list[errors.Owl2Error]:
    arguments: dict[type, tuple[Any, ...]] = {
        errors.InsufficientMemoryError: (3 << 30, 2 << 30, ["weights 3 GiB"], ["close programs"], "owl2 plan BUNDLE"),
        errors.ContextOverflowError: (3, 6, 8, "shorten the prompt"),
    }
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.Owl2Error)
    ]
    return [error(*arguments.get(error, ("a message",))) for error in classes]


@pytest.mark.parametrize("error", error_instances(), ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: errors.Owl2Error) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_every_error_is_drawn_in_the_tree() -> None:
    drawn = errors.__doc__ or ""
    assert all(type(error).__name__ in drawn for error in error_instances())
