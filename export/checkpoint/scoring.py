"""Which preset of ``owl2 score`` fits a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owl2.export.config import ExportConfig
from owl2.runtime.scoring.scale import USUAL

# The architecture of all of these is the same, and so are their files; what a model was trained to be asked is not in
# them. Names of their makers, without what people write between the words.
PRESETS = {
    "compare2score": "compare2score",
    "qinstruct": "q-instruct",
    "onealign": "q-align",
    "qalign": "q-align",
    "deqa": "q-align",
}
FOLDERS = 3
"""Parts of a path that may name the model: those of a hub's cache end with models--NAME/snapshots/HASH."""


def find_preset(folder: Path, config: Mapping[str, Any], adapter: Path | None = None) -> str:
    """Name of the preset; empty if no name tells.

    Args:
        folder: of the checkpoint.
        config: its config.json, which may name what it was trained from or saved as.
        adapter: folder of the adapter that is merged, whose name goes first.
    """
    given = [] if adapter is None else [adapter]
    names = [*("/".join(path.resolve().parts[-FOLDERS:]) for path in (*given, folder)), config.get("_name_or_path")]
    for name in names:
        plain = re.sub(r"[-_. ]", "", str(name).lower())
        for word, preset in PRESETS.items():
            if word in plain:
                return preset
    return ""


def preset_of(config: ExportConfig, told: str) -> str:
    """Name of the preset with which the model scores images; empty if it is not known to.

    That of the settings, or the one that names have ``told``, or the usual one if it is to score.
    """
    if config.preset is not None:
        return config.preset
    return told or (USUAL if config.purpose == "scoring" else "")
