"""Fixtures of the runtime's tests."""

import pytest
from cases import CASES, Case
from conftest import GOLDEN


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    bundle = request.getfixturevalue(f"bundle_{request.param.removesuffix('_ort')}")
    return Case(GOLDEN / CASES[request.param], bundle, "onnxruntime" if request.param.endswith("_ort") else None)
