"""What is found on a machine, read from recorded text."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from owl2.runtime.errors import ConfigError
from owl2.runtime.fit.machine import (
    SystemPaths,
    free_swap,
    host_memory,
    parse_cgroup,
    parse_jetson_model,
    parse_meminfo,
    parse_nvidia_smi,
    parse_swaps,
    read_bandwidth,
    this_cpu,
    this_gpu,
)
from owl2.runtime.fit.products import GIB, PRODUCTS, TENSORRT_RTX, find_product

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
def paths(tmp_path: Path) -> SystemPaths:
    """A machine with 4 GB, of which 3.1 GiB are available: little is free, much of it is page cache."""
    made = SystemPaths(*(tmp_path / name for name in ("meminfo", "swaps", "cgroup", "cgroups", "model")))
    made.meminfo.write_text(MEMINFO)
    made.cgroups.mkdir()
    return made


def group(paths: SystemPaths, path: str, **files: object) -> None:
    folder = paths.cgroups / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_page_cache_counts_as_available(paths: SystemPaths) -> None:
    memory = host_memory(paths)
    assert memory is not None
    assert (memory.total, memory.available, memory.limited) == (3884364 * 1024, 3221225 * 1024, False)


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: many kB\nMemTotal: 5 kB\n", "\0\n"])
def test_meminfo_that_says_nothing(text: str) -> None:
    assert parse_meminfo(text) is None


def test_a_system_without_proc(tmp_path: Path) -> None:
    nowhere = SystemPaths(*(tmp_path / "none" for _ in range(5)))
    assert host_memory(nowhere) is None
    assert this_cpu(nowhere) is None
    assert free_swap(nowhere) == 0


class TestControlGroups:
    def test_parsing_both_versions(self) -> None:
        text = "12:cpuset:/\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/user.slice/session\ngarbage\n"
        assert [(version, str(path)) for version, path in parse_cgroup(text)] == [
            ("v1", "/docker/abc"),
            ("v2", "/user.slice/session"),
        ]

    def test_version_2_and_what_it_can_drop(self, paths: SystemPaths) -> None:
        paths.cgroup.write_text("0::/box\n")
        group(paths, "box", max=2048 * MIB, current=1500 * MIB, stat=f"anon 1\ninactive_file {500 * MIB}\nslab 3")
        memory = host_memory(paths)
        assert memory is not None
        assert (memory.available, memory.limited) == (1048 * MIB, True)
        # Pages of a file that was read twice, as a bundle that was copied and verified, are active.
        stat = f"anon 1\ninactive_file {500 * MIB}\nactive_file {700 * MIB}\nslab_reclaimable {20 * MIB}\nslab 3"
        group(paths, "box", stat=stat)
        memory = host_memory(paths)
        assert memory is not None
        assert memory.available == (2048 - 1500 + 500 + 700 + 20) * MIB

    def test_the_parent_limits_too(self, paths: SystemPaths) -> None:
        paths.cgroup.write_text("0::/box/inner\n")
        group(paths, "box", max=1000 * MIB, current=900 * MIB)
        group(paths, "box/inner", max="max", current=100 * MIB)
        memory = host_memory(paths)
        assert memory is not None
        assert memory.available == 100 * MIB

    def test_inside_a_container_only_the_root_is_seen(self, paths: SystemPaths) -> None:
        paths.cgroup.write_text("0::/system.slice/docker-4f.scope\n")
        group(paths, "", max=512 * MIB, current=12 * MIB)
        memory = host_memory(paths)
        assert memory is not None
        assert memory.available == 500 * MIB

    def test_version_1(self, paths: SystemPaths) -> None:
        paths.cgroup.write_text("4:memory:/docker/abc\n")
        stat = f"inactive_file 7\nactive_file 7\ntotal_inactive_file {MIB}\ntotal_active_file {2 * MIB}"
        group(paths, "memory/docker/abc", limit_in_bytes=64 * MIB, usage_in_bytes=60 * MIB, stat=stat)
        group(paths, "memory", limit_in_bytes=2**63 - 4096, usage_in_bytes=9 * GIB)
        memory = host_memory(paths)
        assert memory is not None
        assert memory.available == 7 * MIB

    @pytest.mark.parametrize("limit", ["max", "", str(64 * GIB)])
    def test_no_limit_or_a_wide_one(self, paths: SystemPaths, limit: str) -> None:
        paths.cgroup.write_text("0::/\n")
        group(paths, "", max=limit, current=MIB)
        memory = host_memory(paths)
        assert memory is not None
        assert not memory.limited

    def test_more_in_use_than_allowed(self, paths: SystemPaths) -> None:
        paths.cgroup.write_text("0::/\n")
        group(paths, "", max=MIB, current=2 * MIB)
        memory = host_memory(paths)
        assert memory is not None
        assert memory.available == 0


def test_swap_on_a_disk_counts_and_zram_does_not(paths: SystemPaths) -> None:
    assert parse_swaps(SWAPS) == (8388604 - 1024) * 1024
    assert parse_swaps("") == parse_swaps(SWAPS.splitlines()[0]) == 0
    paths.swaps.write_text(SWAPS)
    assert free_swap(paths) == parse_swaps(SWAPS)
    paths.cgroup.write_text("0::/\n")
    group(paths, "", max=MIB, current=0)
    assert free_swap(paths) == 0
    # Version 2 limits swap apart from memory, in the group and in every one above it.
    paths.cgroup.write_text("0::/box/inner\n")
    group(paths, "box/inner", **{"swap.max": "max", "swap.current": 0})
    assert free_swap(paths) == parse_swaps(SWAPS)
    group(paths, "box", **{"swap.max": 600 * MIB, "swap.current": 100 * MIB})
    assert free_swap(paths) == 500 * MIB
    group(paths, "box/inner", **{"swap.max": 0, "swap.current": 0})
    assert free_swap(paths) == 0


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


def test_a_jetson_shares_its_memory_with_the_cpu(paths: SystemPaths) -> None:
    paths.model.write_text("NVIDIA Jetson Orin Nano Developer Kit\0")
    found, memory = this_gpu(paths), host_memory(paths)
    assert found is not None
    assert memory is not None
    assert (found.device.name, found.available) == ("orin-nano-4gb", memory.available)


def test_a_jetson_in_a_container_without_proc_device_tree(paths: SystemPaths, tmp_path: Path) -> None:
    hidden = replace(paths, firmware=tmp_path / "firmware")
    assert this_gpu(hidden) is None
    hidden.firmware.write_text("NVIDIA Jetson Orin Nano Developer Kit\0")
    found = this_gpu(hidden)
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
    speeds = [None if gpu.device.bandwidth is None else gpu.device.bandwidth / 1e9 for gpu in found]
    # Another size of a product, and products that the table does not have, have no bandwidth.
    assert speeds == [360, 288, 2039, 3350, 320, None, None, None]
    assert found[0].device.memory == 12288 * MIB
    assert found[0].available == 11200 * MIB
    assert [gpu.device.engines for gpu in found[:5]] == [
        ("tensorrt-rtx",),
        ("tensorrt-rtx",),
        ("tensorrt", "tensorrt-rtx"),
        ("tensorrt",),
        ("tensorrt", "tensorrt-rtx"),
    ]


def test_this_machine() -> None:
    """The real files of this system, where it has them."""
    memory = host_memory()
    if memory is not None:
        assert 0 < memory.available <= memory.total
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert memory.total == pytest.approx(pages, rel=0.01)
    assert 1e8 < read_bandwidth() < 1e13


class TestTable:
    def test_names_are_unique_and_figures_of_the_right_size(self) -> None:
        for name, device in PRODUCTS.items():
            assert device.name == name
            assert 4 * GIB <= device.memory <= 128 * GIB
            assert device.bandwidth is not None
            assert 5e10 <= device.bandwidth <= 4e12
            assert device.shared == (device.family == "jetson")
            assert device.engines

    def test_engines(self) -> None:
        assert find_product("orin-nano-8gb").engines == ("tensorrt",)
        assert find_product("rtx3060").engines == ("tensorrt-rtx",)
        assert find_product("thor-128gb").engines == ("tensorrt",)
        assert {device.compute for device in PRODUCTS.values() if "tensorrt-rtx" in device.engines} <= TENSORRT_RTX
        assert not find_product("t4").int4_engines
        assert find_product("rtx3060").int4_engines
        assert not replace(find_product("rtx3060"), family="cpu", compute=None).int4_engines

    def test_unknown(self) -> None:
        with pytest.raises(ConfigError, match=r"device 'rtx1' is not known; known: orin-nano-4gb, .*rtx5090"):
            find_product("rtx1")
