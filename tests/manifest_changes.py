"""Small changes of a manifest, one leaf each: what damage, a careless edit or an attacker makes of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

Path_ = tuple[str | int, ...]
CHOICES = {
    "dialect": ("onnx",),
    "activations": ("fp16",),
    "decoder": ("int8", "fp16"),
    "head": ("int4", "fp32"),
    "vision": ("fp16", "fp32"),
    "embeddings": ("fp32",),
    "method": ("rtn",),
    "hidden_act": ("gelu",),
    "mode": ("pad", "crop"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}),
}
"""Other values of keys that are not numbers."""


def changes(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every change of a manifest: a name for it, and the text of the changed ``owl2.json``."""
    for path, value in leaves(manifest):
        name = ".".join(map(str, path))
        for other in others(path, value):
            if other == value:
                continue
            yield f"{name}: {value} -> {other}", _text(edited(manifest, path, other))
    for first, second in SWAPS:
        files = dict(manifest["files"])
        files[first], files[second] = files[second], files[first]
        yield f"files: {first} <-> {second}", _text(manifest | {"files": files})
    for path in DROPPED:
        changed = copy.deepcopy(manifest)
        *way, last = path
        part = changed
        for key in way:
            part = part[key]
        del part[last]
        yield f"without {'.'.join(path)}", _text(changed)
    for key, again in TWICE:
        yield f"{key} twice", _text(manifest).replace(f'"{key}":', f'"{key}": {again}, "{key}":', 1)
        whole = json.dumps(_find(manifest, key))
        yield (
            f"{key} twice, last",
            _text(manifest).replace(f'"{key}": {whole}', f'"{key}": {whole}, "{key}": {again}', 1),
        )


SWAPS = (("vision.onnx", "decoder.onnx"), ("tokenizer_config.json", "special_tokens_map.json"))
DROPPED = (
    ("producer",), ("kv_cache", "int8"), ("model", "decoder", "eos_token_ids"), ("model", "preprocess", "mode"),
    ("files", "report.json"), ("files", "decoder.kv_int8.onnx"), ("engines",),
)  # fmt: skip
TWICE = (
    ("eos_token_ids", [13]),
    ("mode", '"crop"'),
    ("rope_theta", 5000.0),
    ("rms_norm_eps", 0.01),
    ("bos_token_id", 2),
)


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Values that are no objects or lists, each with the keys that lead to it."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, (*path, key))
    else:
        yield path, value


def others(path: Path_, value: Any) -> tuple[Any, ...]:
    """Other values for a leaf."""
    key = path[-1]
    if key in CHOICES:
        return CHOICES[str(key)]
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1,) if "files" in path else (value + 1, max(value // 2, 0))
    if isinstance(value, float):
        return (value * 1.5,)
    if key == "sha256":
        return (value[::-1],)
    return (value + "0",)


def edited(manifest: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    part: Any = changed
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return changed


def _find(value: Any, key: str) -> Any:
    """The value of a key, wherever it is."""
    if not isinstance(value, dict):
        return None
    return value[key] if key in value else next(filter(None, (_find(part, key) for part in value.values())), None)


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest)
