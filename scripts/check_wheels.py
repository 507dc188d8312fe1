"""Whether installing needs nothing but binary wheels on aarch64, for each Python that JetPack may bring.

Builds the wheel of this project and lets pip resolve it for another machine; nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12")
# Ubuntu 22.04, under JetPack 6, has glibc 2.35: all of these run there.
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")

Metadata = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wheel:
    """What pip would install."""

    package: str
    version: str
    file: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """What one Python gets; ``problem`` says why it cannot be installed, if so."""

    python: str
    wheels: tuple[Wheel, ...]
    problem: str = ""


def for_aarch64(python: str) -> list[str]:
    """Options that make pip choose wheels, and nothing else, for a Python ("3.10") on aarch64 Linux."""
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this project into ``folder``.

    Raises:
        CalledProcessError: it cannot be built.
    """
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True)
    return max(folder.glob("owl2-*.whl"), key=lambda path: path.stat().st_mtime)


def forgotten(packages: Sequence[Metadata], python: str) -> list[str]:
    """Requirements that hold on aarch64 with ``python`` and are not among ``packages``.

    pip evaluates conditions such as ``python_version < "3.11"`` for the machine that it runs on, whatever it resolves
    for, and so may leave one out.
    """
    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "aarch64",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    there = {canonicalize_name(package["name"]) for package in packages}
    wanted = [Requirement(text) for package in packages for text in package.get("requires_dist", ())]
    missing = [need for need in wanted if need.marker is not None and need.marker.evaluate(target)]
    return sorted({str(need) for need in missing if canonicalize_name(need.name) not in there})


def resolve(requirement: str, python: str) -> Resolution:
    """What pip would install for ``requirement`` with ``python`` on aarch64."""
    requirements = [requirement]
    while True:
        packages, problem = dry_run(requirements, python)
        missing = [] if problem else forgotten([package["metadata"] for package in packages], python)
        if not missing:
            return Resolution(python, tuple(map(_wheel, packages)), problem)
        requirements += [text.partition(";")[0] for text in missing]


def dry_run(requirements: Sequence[str], python: str) -> tuple[list[Metadata], str]:
    """The packages of pip's report on installing for ``python`` on aarch64, and why it would not, if so."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        options = ["--ignore-installed", "--target", scratch, "--report", str(report), *for_aarch64(python)]
        done = subprocess.run([*pip, *options, *requirements], capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return [], "; ".join(errors) or done.stderr.strip()
        return json.loads(report.read_text(encoding="utf-8"))["install"], ""


def _wheel(package: Metadata) -> Wheel:
    metadata = package["metadata"]
    return Wheel(metadata["name"], metadata["version"], package["download_info"]["url"].rsplit("/")[-1])


def table(resolutions: Sequence[Resolution]) -> str:
    """Plain text, one line per wheel."""
    lines = []
    for resolution in resolutions:
        lines.append(f"Python {resolution.python}: {resolution.problem or f'{len(resolution.wheels)} wheels'}")
        lines += [f"  {wheel.package:16}{wheel.version:12}{wheel.file}" for wheel in resolution.wheels]
    return "\n".join(lines)


def main() -> int:
    """Command line; 1 if some Python would have to build something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help=f"such as 3.10; repeatable (default {', '.join(PYTHONS)})")
    parser.add_argument("--extra", action="append", default=[], help="of this project, such as hub; repeatable")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        extras = f"[{','.join(arguments.extra)}]" if arguments.extra else ""
        requirement = f"{build_wheel(Path(scratch))}{extras}"
        resolutions = [resolve(requirement, python) for python in arguments.python or PYTHONS]
    print(json.dumps([asdict(entry) for entry in resolutions], indent=2) if arguments.json else table(resolutions))
    return int(any(resolution.problem for resolution in resolutions))


if __name__ == "__main__":
    raise SystemExit(main())
