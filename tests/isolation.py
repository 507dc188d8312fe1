"""Code to run first in a process that must do without the exporter and what it needs."""

# Importing any of these raises, as if it were not installed.
BLOCKED = """
import sys
class Blocker:
    names = ("torch", "transformers", "onnx", "safetensors", "rich", "huggingface_hub", "ml_dtypes")
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is blocked in this test")
        if name.startswith(("owl2.export", "owl2.quant")):
            raise ImportError(f"{name} is not installed on a device")
sys.meta_path.insert(0, Blocker())
"""
