"""Memory and devices of a machine, read from recorded text."""

import os
from pathlib import Path

import pytest
from planning import nvidia_smi, write

from owl2.runtime.fit.machine import (
    MemoryBudget,
    driver_version,
    free_swap,
    gpus,
    parse_jetson_model,
    parse_nvidia_smi,
    parse_swaps,
    read_bandwidth,
    this_cpu,
    this_gpu,
)
from owl2.runtime.fit.products import GIB
from owl2.runtime.memory import control_groups, parse_meminfo

MEMINFO = """MemTotal:        3884364 kB
MemFree:          187000 kB
MemAvailable:    3221225 kB
Buffers:           60384 kB
Cached:          2912384 kB
SwapTotal:       1942180 kB
SwapFree:        1942180 kB
"""
SWAPS = """Filename				Type		Size		Used		Priority
/dev/zram0                              partition	970000		0		5
/mnt/swapfile                           file		8388604		1024		-2
"""
MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 4 GB, of which 3.1 GiB are available: little is free, much of it is page cache."""
    write(tmp_path, "proc/meminfo", MEMINFO)
    return tmp_path


def group(root: Path, path: str, **files: object) -> None:
    for name, content in files.items():
        write(root, f"sys/fs/cgroup/{path}/memory.{name}", f"{content}\n")


def cpu_of(root: Path) -> MemoryBudget:
    found = this_cpu(root)
    assert found is not None
    return found


def test_page_cache_counts_as_available(root: Path) -> None:
    memory = cpu_of(root)
    assert (memory.device.memory, memory.available, memory.limited) == (3884364 * 1024, 3221225 * 1024, False)
    assert memory.host == memory.available


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: many kB\nMemTotal: 5 kB\n", "\0\n"])
def test_meminfo_that_says_nothing(text: str) -> None:
    assert parse_meminfo(text) is None


def test_a_system_without_proc(tmp_path: Path) -> None:
    assert this_cpu(tmp_path) is None
    assert free_swap(tmp_path) == 0
    assert driver_version(tmp_path) is None


class TestControlGroups:
    def test_parsing_both_versions(self, root: Path) -> None:
        text = "12:cpuset:/\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/user.slice/session\ngarbage\n"
        write(root, "proc/self/cgroup", text)
        mounted = root / "sys/fs/cgroup"
        assert list(control_groups(root)) == [
            ("v1", mounted / "memory" / "docker" / "abc"),
            ("v1", mounted / "memory" / "docker"),
            ("v1", mounted / "memory"),
            ("v2", mounted / "user.slice" / "session"),
            ("v2", mounted / "user.slice"),
            ("v2", mounted),
        ]

    def test_version_2_and_what_it_can_drop(self, root: Path) -> None:
        write(root, "proc/self/cgroup", "0::/box\n")
        group(root, "box", max=2048 * MIB, current=1500 * MIB, stat=f"anon 1\ninactive_file {500 * MIB}\nslab 3")
        memory = cpu_of(root)
        assert (memory.available, memory.limited) == (1048 * MIB, True)
        assert memory.closable == 0
        # Pages of a file that was read twice, as a bundle that was copied and verified, are active.
        stat = f"anon 1\ninactive_file {500 * MIB}\nactive_file {700 * MIB}\nslab_reclaimable {20 * MIB}\nslab 3"
        group(root, "box", stat=stat)
        assert cpu_of(root).available == (2048 - 1500 + 500 + 700 + 20) * MIB

    def test_the_parent_limits_too(self, root: Path) -> None:
        write(root, "proc/self/cgroup", "0::/box/inner\n")
        group(root, "box", max=1000 * MIB, current=900 * MIB)
        group(root, "box/inner", max="max", current=100 * MIB)
        assert cpu_of(root).available == 100 * MIB

    def test_inside_a_container_only_the_root_is_seen(self, root: Path) -> None:
        write(root, "proc/self/cgroup", "0::/system.slice/docker-4f.scope\n")
        group(root, "", max=512 * MIB, current=12 * MIB)
        assert cpu_of(root).available == 500 * MIB

    def test_version_1(self, root: Path) -> None:
        write(root, "proc/self/cgroup", "4:memory:/docker/abc\n")
        stat = f"inactive_file 7\nactive_file 7\ntotal_inactive_file {MIB}\ntotal_active_file {2 * MIB}"
        group(root, "memory/docker/abc", limit_in_bytes=64 * MIB, usage_in_bytes=60 * MIB, stat=stat)
        group(root, "memory", limit_in_bytes=2**63 - 4096, usage_in_bytes=9 * GIB)
        assert cpu_of(root).available == 7 * MIB

    @pytest.mark.parametrize("limit", ["max", "", str(64 * GIB)])
    def test_no_limit_or_a_wide_one(self, root: Path, limit: str) -> None:
        write(root, "proc/self/cgroup", "0::/\n")
        group(root, "", max=limit, current=MIB)
        assert not cpu_of(root).limited

    def test_more_in_use_than_allowed(self, root: Path) -> None:
        write(root, "proc/self/cgroup", "0::/\n")
        group(root, "", max=MIB, current=2 * MIB)
        assert cpu_of(root).available == 0


def test_swap_on_a_disk_counts_and_zram_does_not(root: Path) -> None:
    assert parse_swaps(SWAPS) == (8388604 - 1024) * 1024
    assert parse_swaps("") == parse_swaps(SWAPS.splitlines()[0]) == 0
    write(root, "proc/swaps", SWAPS)
    assert free_swap(root) == parse_swaps(SWAPS)
    write(root, "proc/self/cgroup", "0::/\n")
    group(root, "", max=MIB, current=0)
    assert free_swap(root) == 0
    # Version 2 limits swap separately, in the group and in every one above it.
    write(root, "proc/self/cgroup", "0::/box/inner\n")
    group(root, "box/inner", **{"swap.max": "max", "swap.current": 0})
    assert free_swap(root) == parse_swaps(SWAPS)
    group(root, "box", **{"swap.max": 600 * MIB, "swap.current": 100 * MIB})
    assert free_swap(root) == 500 * MIB
    group(root, "box/inner", **{"swap.max": 0, "swap.current": 0})
    assert free_swap(root) == 0


@pytest.mark.parametrize(
    ("model", "kibibytes", "name"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit\0", 7802056, "orin-nano-8gb"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0", 7802056, "orin-nano-8gb"),
        ("NVIDIA Jetson Orin Nano 4GB\0", 3500000, "orin-nano-4gb"),
        ("NVIDIA Orin NX Developer Kit\0", 15908000, "orin-nx-16gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0", 7600000, "orin-nx-8gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit\0", 64349888, "agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin\0", 31000000, "agx-orin-32gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit\0", 128000000, "thor-128gb"),
        ("Raspberry Pi 5 Model B Rev 1.0\0", 8000000, None),
    ],
)
def test_jetson_by_its_device_tree(model: str, kibibytes: int, name: str | None) -> None:
    found = parse_jetson_model(model, kibibytes * 1024)
    assert (found.name if found else None) == name


def test_a_jetson_shares_its_memory_with_the_cpu(root: Path) -> None:
    write(root, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    found, memory = this_gpu(root), cpu_of(root)
    assert found is not None
    assert (found.device.name, found.available, found.host) == ("orin-nano-4gb", memory.available, memory.available)


def test_a_jetson_in_a_container_without_proc_device_tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    assert this_gpu(root) is None
    write(root, "sys/firmware/devicetree/base/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    found = this_gpu(root)
    assert found is not None
    assert found.device.name == "orin-nano-4gb"


SMI = """NVIDIA GeForce RTX 3060, 12288, 11200, 8.6
NVIDIA GeForce RTX 4060 Ti, 16380, 15900, 8.9
NVIDIA A100-SXM4-80GB, 81920, 81000, 8.0
NVIDIA H100 80GB HBM3, 81559, 81000, 9.0
Tesla T4, 15360, 15000, 7.5
NVIDIA GeForce RTX 3060, 8192, 8000, 8.6
NVIDIA GeForce RTX 4070 Ti, 12282, 12000, 8.9
NVIDIA GeForce RTX 9999, 50000, 49000, 13.0
Orin (nvgpu), [N/A], [N/A], 8.7
No devices were found
"""


def test_gpus_by_nvidia_smi() -> None:
    found = parse_nvidia_smi(SMI)
    speeds = [None if device.bandwidth is None else device.bandwidth / 1e9 for device, _ in found]
    # Another size of a product, and products that the table does not have, have no bandwidth.
    assert speeds == [360, 288, 2039, 3350, 320, None, None, None]
    device, free = found[0]
    assert device.memory == 12288 * MIB
    assert free == 11200 * MIB
    assert [device.engines for device, _ in found[:5]] == [
        ("tensorrt-rtx",),
        ("tensorrt-rtx",),
        ("tensorrt", "tensorrt-rtx"),
        ("tensorrt",),
        ("tensorrt", "tensorrt-rtx"),
    ]


def test_a_gpu_has_its_own_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    nvidia_smi(root, "NVIDIA GeForce RTX 3060, 12288, 9216, 8.6")
    (found,) = gpus(root)
    assert (found.available, found.host, found.here) == (9 * GIB, 3221225 * 1024, True)
    assert 2.5 * GIB < found.closable < 3 * GIB


def test_this_machine() -> None:
    """The real files of this system, where it has them."""
    memory = this_cpu()
    if memory is not None:
        assert 0 < memory.available <= memory.device.memory
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert memory.device.memory == pytest.approx(pages, rel=0.01)
    assert 1e8 < read_bandwidth() < 1e13


def test_the_bandwidth_is_measured_where_no_affinity_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert 1e8 < read_bandwidth() < 1e13
