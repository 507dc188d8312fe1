"""The torch model: plain, readable, the reference that every exported graph is compared with.

Parameter names are those of the official checkpoint, so ``load_state_dict`` needs no renaming.
"""

from owl2.quant.models.mplug_owl2.abstractor import VisualAbstractor
from owl2.quant.models.mplug_owl2.decoder import DecoderLayer, RmsNorm, Routing, rotary_tables
from owl2.quant.models.mplug_owl2.owl2 import Owl2Model
from owl2.quant.models.mplug_owl2.vision import VisionModel

__all__ = [
    "DecoderLayer",
    "Owl2Model",
    "RmsNorm",
    "Routing",
    "VisionModel",
    "VisualAbstractor",
    "rotary_tables",
]
