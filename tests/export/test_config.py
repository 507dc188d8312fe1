"""Settings of an export are checked before anything begins."""

from pathlib import Path
from typing import Any

import pytest

from owl2.export.config import ExportConfig
from owl2.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int3"}, "weights 'int3': use one of int4, int8, fp16, fp32"),
        ({"vision": "int4"}, "vision 'int4': use one of int8, fp16, fp32"),
        ({"group_size": 100}, "group_size 100 is not supported"),
        ({"method": "awq"}, "method 'awq' is not known; use gptq or rtn"),
        ({"samples": 0}, "samples must be positive"),
        ({"device": "gpu"}, "device 'gpu': use cpu, cuda or cuda:N"),
        ({"calibration": 3}, "calibration must be a path, got 3"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig(Path("in"), Path("out"), **settings)


def test_paths_may_be_strings() -> None:
    config = ExportConfig("in", "out", calibration="images")  # type: ignore[arg-type]
    assert config == ExportConfig(Path("in"), Path("out"), calibration=Path("images"))
    with pytest.raises(ConfigError, match="bundle must be a path, got None"):
        ExportConfig("in", None)  # type: ignore[arg-type]


def test_float_weights_have_no_gptq_layout() -> None:
    with pytest.raises(ConfigError, match="layout gptq has integer weights"):
        ExportConfig(Path("in"), Path("out"), weights="fp16", layout="gptq")
    with pytest.raises(ConfigError, match=r"layout gptq .* vision int8"):
        ExportConfig(Path("in"), Path("out"), vision="int8", layout="gptq")
