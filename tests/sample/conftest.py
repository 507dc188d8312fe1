"""The sample's scripts import each other by their bare names."""

import sys
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "sample"
sys.path.insert(0, str(SAMPLE))
