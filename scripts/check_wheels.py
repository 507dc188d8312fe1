"""Check that installing needs nothing but binary wheels on aarch64, for each Python that JetPack may bring.

Builds the wheel of this project and lets pip download it with its requirements for another machine; nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from email import message_from_bytes
from pathlib import Path
from types import MappingProxyType
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
    """A wheel that pip would install."""

    package: str
    version: str
    file: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """Wheels for one Python; ``problem`` says why it cannot be installed, if so."""

    python: str
    wheels: tuple[Wheel, ...]
    problem: str = ""


def for_aarch64(python: str) -> list[str]:
    """Options that make pip choose wheels, and nothing else, for a Python ("3.10") on aarch64 Linux."""
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]


PURE = {"OWL2_PURE": "1"}
"""Settings of a build without the native core."""
CROSS = {
    "CMAKE_ARGS": "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    # How scikit-build-core and packaging name the module and the wheel. Both machines have the same sizes of C's types,
    # so that this machine's headers of Python serve.
    "SETUPTOOLS_EXT_SUFFIX": f".cpython-{sys.version_info[0]}{sys.version_info[1]}-aarch64-linux-gnu.so",
    "_PYTHON_HOST_PLATFORM": "linux-aarch64",
}
"""Settings of a build for aarch64 with Debian's cross-compiler."""


def build_wheel(folder: Path, settings: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Build the wheel of this project into ``folder``.

    Args:
        folder: for the wheel.
        settings: environment variables of the build.

    Raises:
        CalledProcessError: it cannot be built.
    """
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True, env=os.environ | settings)
    return max(folder.glob("owl2-*.whl"), key=lambda path: path.stat().st_mtime)


def omitted(packages: Sequence[Metadata], python: str) -> list[str]:
    """Requirements that apply on aarch64 with ``python`` and are not among ``packages``.

    pip evaluates conditions such as ``python_version < "3.11"`` for the machine that it runs on, whatever it resolves
    for, and so may omit one.
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
    names = {canonicalize_name(package["name"]) for package in packages}
    requirements = [Requirement(text) for package in packages for text in package.get("requires_dist", ())]
    applicable = [need for need in requirements if need.marker is not None and need.marker.evaluate(target)]
    return sorted({str(need) for need in applicable if canonicalize_name(need.name) not in names})


def resolve(requirement: str, python: str) -> Resolution:
    """Find the wheels that pip would install for ``requirement`` with ``python`` on aarch64."""
    requirements = [requirement]
    while True:
        with tempfile.TemporaryDirectory() as folder:
            problem = download(requirements, python, Path(folder))
            files = sorted(Path(folder).glob("*.whl"))
            packages = [read_metadata(file) for file in files]
        missing = [] if problem else omitted(packages, python)
        if not missing:
            wheels = (Wheel(package["name"], package["version"], file.name) for package, file in zip(packages, files))
            return Resolution(python, tuple(wheels), problem)
        requirements += [text.partition(";")[0] for text in missing]


def download(requirements: Sequence[str], python: str, folder: Path) -> str:
    """Download wheels for ``python`` on aarch64; returns why that is not possible, or nothing.

    Installing with --dry-run would be quicker, but compares Requires-Python with the Python that pip runs on.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([*pip, *for_aarch64(python), *requirements], capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "; ".join(errors) or done.stderr.strip()


def read_metadata(wheel: Path) -> Metadata:
    """Name, version and requirements of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
        fields = message_from_bytes(archive.read(name))
    return {"name": fields["Name"], "version": fields["Version"], "requires_dist": fields.get_all("Requires-Dist", [])}


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
        requirement = f"{build_wheel(Path(scratch), PURE)}{extras}"
        resolutions = [resolve(requirement, python) for python in arguments.python or PYTHONS]
    print(json.dumps([asdict(entry) for entry in resolutions], indent=2) if arguments.json else table(resolutions))
    return int(any(resolution.problem for resolution in resolutions))


if __name__ == "__main__":
    raise SystemExit(main())
