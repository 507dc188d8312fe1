"""A small aarch64 Debian in a folder, whose Python runs on this machine through qemu.

Nothing is installed on this machine, and no root rights are used: apt downloads and checks the packages into a folder
of its own, dpkg-deb unpacks them, and pip fetches wheels for the other machine. Existing folders are kept.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from check_wheels import for_aarch64

# The tree has glibc 2.36 and Python 3.11. onnxruntime 1.32 needs a newer qemu than its 7.2.
TREE_SUITE, PYTHON = "bookworm", "3.11"
QEMU_SUITE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "gpgv": "gpgv",
    "tar": "tar",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
}

SOURCES = "deb [signed-by={keyring}] {mirror} {suite} main\n"
APT = """
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{folder}";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}";
APT::Architecture "{architecture}";
APT::Architectures "{architecture}";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python to start programs with.

    Attributes:
        command: begins the command line.
        path: folders to import from.
    """

    command: tuple[str, ...]
    path: tuple[Path, ...]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run with these arguments, one thread for numpy's BLAS, and no settings of the user's Python."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, self.path)), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
        command = [*self.command, "-s", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run(*command: object, environment: Mapping[str, str] | None = None) -> str:
    """Run a tool and return its output; exits with its last messages if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        sys.exit(f"{' '.join(words[:6])} … failed:\n{last}")
    return done.stdout


def check_tools() -> None:
    """Exit if something is missing, saying what to install."""
    if (platform.machine(), sys.platform) != ("x86_64", "linux"):
        sys.exit(f"this needs x86-64 Linux, this is {platform.machine()} {sys.platform}; on aarch64 use owl2 verify")
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if not KEYRING.is_file():
        missing.append("debian-archive-keyring")
    if missing:
        sys.exit(f"missing packages: {', '.join(missing)}; install them with apt (Debian, Ubuntu)")


def debian_mirror() -> str:
    """The mirror that this machine's own apt uses for Debian; exits if it has none."""
    form = "$(ORIGIN)|$(LABEL)|$(SITE)"
    listed = run("apt-get", "indextargets", "--format", form).splitlines()
    mirrors = [line.rsplit("|", 1)[1] for line in listed if line.startswith("Debian|Debian|")]
    if not mirrors:
        sys.exit("this machine's apt has no mirror of Debian; run apt-get update, or give one with --mirror URL")
    return mirrors[0]


def fetch(folder: Path, mirror: str, suite: str, architecture: str, packages: Sequence[str]) -> list[Path]:
    """Download packages with all their dependencies, through an apt without any installed package."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(SOURCES.format(keyring=KEYRING, mirror=mirror, suite=suite))
    settings = folder / "apt.conf"
    settings.write_text(APT.format(folder=folder, architecture=architecture))
    environment = os.environ | {"APT_CONFIG": str(settings)}
    run("apt-get", "--quiet", "update", environment=environment)
    run("apt-get", "--quiet", "--yes", "install", "--download-only", *packages, environment=environment)
    return sorted((folder / "archives").glob("*.deb"))


def make_tree(scratch: Path, mirror: str) -> Path:
    """Folder of the aarch64 system."""
    tree, partial = scratch / "tree", scratch / "tree.partial"
    if not tree.exists():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        packages = ["python3", "libstdc++6"]
        for package in fetch(scratch / "apt-tree", mirror, TREE_SUITE, "arm64", packages):
            run("dpkg-deb", "--extract", package, partial)
        partial.rename(tree)
    return tree


def make_qemu(scratch: Path, mirror: str) -> Path:
    """Path of the emulator, a statically linked program."""
    qemu, partial = scratch / "qemu-aarch64", scratch / "qemu.partial"
    if not qemu.exists():
        partial.mkdir(parents=True, exist_ok=True)
        (package,) = fetch(scratch / "apt-qemu", mirror, QEMU_SUITE, "amd64", ["qemu-user"])
        archive = partial / "qemu.tar"
        with archive.open("wb") as out:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=out, check=True)
        run("tar", "-xf", archive, "-C", partial, "./usr/bin/qemu-aarch64")
        (partial / "usr/bin/qemu-aarch64").rename(qemu)
        shutil.rmtree(partial)
    return qemu


def make_site(folder: Path, requirements: Sequence[str], options: Sequence[str]) -> Path:
    """Folder of installed wheels."""
    partial = folder.with_name(folder.name + ".partial")
    if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run(*pip, "--target", partial, *options, *requirements)
        partial.rename(folder)
    return folder


def aarch64_python(tree: Path, qemu: Path, cpu: str, path: tuple[Path, ...]) -> Interpreter:
    """The tree's Python on the processor that qemu calls ``cpu``."""
    return Interpreter((str(qemu), "-cpu", cpu, "-L", str(tree), str(tree / "usr" / "bin" / f"python{PYTHON}")), path)


def host_python(path: tuple[Path, ...]) -> Interpreter:
    """This machine's Python without its virtual environment, whose packages would come first."""
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return Interpreter((str(base),), path)


AARCH64_WHEELS = tuple(for_aarch64(PYTHON))
"""Options of pip for wheels that the tree's Python can install."""
