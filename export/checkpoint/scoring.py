"""Which preset of ``owl2 score`` fits a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owl2.export.config import ExportConfig
from owl2.runtime.scoring.scale import USUAL

# The architecture of all of these is the same, and so are their files; what a model was trained to be asked is not in
# them. Names of their makers, however the words are joined.
PRESETS = {
    "compare-?2-?score": "compare2score",
    "q-?instruct": "q-instruct",
    "one-?align": "q-align",
    "q-?align": "q-align",
    "deqa": "q-align",
}
HUB = re.compile(r"models--[^/]+(?=/snapshots/[^/]+$)")
"""Names the model in the path of a hub's cache; elsewhere the folder itself does."""


def find_preset(folder: Path, config: Mapping[str, Any], adapter: Path | None = None) -> str:
    """Name of the preset; empty if no name tells.

    Args:
        folder: of the checkpoint.
        config: its config.json, which may name what it was trained from or saved as.
        adapter: folder of the adapter that is merged, whose name goes first.
    """
    given = [] if adapter is None else [adapter]
    for name in (*map(_name, (*given, folder)), str(config.get("_name_or_path"))):
        words = re.sub(r"[^a-z0-9]+", "-", name.lower())
        for pattern, preset in PRESETS.items():
            if re.search(rf"(^|-){pattern}", words):
                return preset
    return ""


def _name(folder: Path) -> str:
    path = folder.resolve()
    found = HUB.search(path.as_posix())
    return found[0] if found else path.name


def preset_of(config: ExportConfig, told: str) -> str:
    """Name of the preset with which the model scores images; empty if it is not known to.

    That of the settings, or the one that names have ``told``, or the usual one if it is to score.
    """
    if config.preset is not None:
        return config.preset
    return told or (USUAL if config.purpose == "scoring" else "")
