"""The native core is there wherever it can be built, so that its tests are not skipped unnoticed."""

import os
import shutil

import pytest

from owl2.runtime.backends.native.support import is_installed


def test_the_native_core_is_built() -> None:
    if os.environ.get("OWL2_PURE"):
        pytest.skip("OWL2_PURE asks for an installation without it")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    assert is_installed(), "pip install -v . says why the native core was not built"
