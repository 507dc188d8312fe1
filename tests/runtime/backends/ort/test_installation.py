"""Sentences on an installation that cannot serve a device; the messages of others are recorded from real ones."""

import sys
from pathlib import Path

import pytest

from owl2.runtime.backends.ort.installation import (
    absent,
    cuda_libraries,
    import_problem,
    library_problem,
    missing_library,
    needs_onnxruntime,
    onnxruntime_wheels,
    overlap,
)
from owl2.runtime.errors import BackendUnavailableError

LOADER = "libcublasLt.so.13: cannot open shared object file: No such file or directory"
LOG = (
    "2026-11-24 21:02:25.335950036 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] /onnxruntime_src/"
    "onnxruntime/core/session/provider_bridge_ort.cc:2043 onnxruntime::Provider& onnxruntime::ProviderLibrary::Get() "
    "[ONNXRuntimeError] : 1 : FAIL : Failed to load library /env/lib/python3.11/site-packages/onnxruntime/capi/"
    f"libonnxruntime_providers_cuda.so with error: {LOADER}"
)
PLUGIN = (
    "[ONNXRuntimeError] : 1 : FAIL : Failed to load library /env/lib/python3.11/site-packages/"
    "onnxruntime_ep_nv_tensorrt_rtx/libonnxruntime_providers_nv_tensorrt_rtx.so with error: libcuda.so.1: cannot open "
    "shared object file: No such file or directory"
)


def distribution(folder: Path, name: str, version: str, *files: str) -> None:
    """An installed distribution as pip leaves it, without its content."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in files))


class TestWheels:
    def test_two_that_own_the_same_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        distribution(tmp_path, "onnxruntime", "1.32.0", "onnxruntime/__init__.py", "onnxruntime/capi/a.so")
        distribution(tmp_path, "onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        wheels = onnxruntime_wheels()
        assert wheels == {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
        assert overlap(wheels, "cuda") == (
            "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are installed in one environment and overwrite each other's "
            "files; keep one: pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'owl2[cuda]'"
        )

    def test_other_packages_are_not_a_second_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        distribution(tmp_path, "onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py")
        distribution(tmp_path, "onnxruntime-ep-nv-tensorrt-rtx", "0.5.0", "onnxruntime_ep_nv_tensorrt_rtx/__init__.py")
        distribution(tmp_path, "onnxruntime-genai", "0.9.0", "onnxruntime_genai/__init__.py")
        distribution(tmp_path, "unrelated", "1.0", "onnxruntime/__init__.py.txt")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        wheels = onnxruntime_wheels()
        assert wheels == {"onnxruntime-gpu": "1.31.1"}
        assert overlap(wheels, "cuda") == overlap({}, "cpu") == ""

    def test_this_environment_has_one(self) -> None:
        assert list(onnxruntime_wheels()) == ["onnxruntime"]

    def test_none_at_all(self) -> None:
        with (
            pytest.raises(ModuleNotFoundError, match="nothing_like_it"),
            needs_onnxruntime(),
        ):
            import nothing_like_it  # type: ignore[import-not-found]  # noqa: F401 - not its business
        assert import_problem({}, "").startswith(
            "ONNX Runtime is not installed: pip install 'owl2[cpu]', or 'owl2[cuda]'"
        )

    def test_one_whose_files_went_with_another(self) -> None:
        with (
            pytest.raises(BackendUnavailableError, match="the files of onnxruntime are not complete"),
            needs_onnxruntime(),
        ):
            from onnxruntime import nothing_like_it  # noqa: F401
        text = import_problem({"onnxruntime-gpu": "1.31.1"}, "cannot import name '__version__' from 'onnxruntime'")
        assert "perhaps another wheel with files of the same names was removed" in text
        assert text.endswith("pip install --force-reinstall --no-deps onnxruntime-gpu")


class TestLibraries:
    @pytest.mark.parametrize(
        ("text", "library"),
        [
            (LOADER, "libcublasLt.so.13"),
            (LOG, "libcublasLt.so.13"),
            (PLUGIN, "libcuda.so.1"),
            ("libstdc++.so.6: cannot open shared object file: No such file or directory", "libstdc++.so.6"),
            ("/lib/libcuda.so.1: undefined symbol: cuMemCreate", None),
            ("", None),
        ],
    )
    def test_the_missing_file(self, text: str, library: str | None) -> None:
        assert missing_library(text) == library

    def test_packages_of_both_ways_of_naming_them(self) -> None:
        assert cuda_libraries(12) == {
            "libcudart.so.12": "nvidia-cuda-runtime-cu12",
            "libcublasLt.so.12": "nvidia-cublas-cu12",
            "libcublas.so.12": "nvidia-cublas-cu12",
            "libcurand.so.10": "nvidia-curand-cu12",
            "libcudnn.so.9": "nvidia-cudnn-cu12",
        }
        assert set(cuda_libraries(13).values()) == {
            "nvidia-cuda-runtime",
            "nvidia-cublas",
            "nvidia-curand",
            "nvidia-cudnn-cu13",
        }

    def test_each_package_is_named_once_and_the_cause_of_a_cause_too(self) -> None:
        wheels = cuda_libraries(13)
        problems = {
            "libcublasLt.so.13": LOADER,
            "libcublas.so.13": LOADER,
            "libcudnn.so.9": "libz.so.1: cannot open shared object file: No such file or directory",
        }
        assert library_problem(problems, wheels) == (
            "libcublasLt.so.13, libcublas.so.13 (because of libcublasLt.so.13), libcudnn.so.9 (because of libz.so.1) "
            "cannot be loaded: pip install nvidia-cublas nvidia-cudnn-cu13, or install CUDA and cuDNN 9"
        )
        assert library_problem({}, wheels) == ""

    def test_the_dynamic_loader_is_asked(self) -> None:
        assert list(absent(["libc.so.6", "libowl2-has-none.so.9"])) == ["libowl2-has-none.so.9"]
        assert missing_library(absent(["libowl2-has-none.so.9"])["libowl2-has-none.so.9"]) == "libowl2-has-none.so.9"
