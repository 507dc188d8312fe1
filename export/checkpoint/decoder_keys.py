"""Keys of the decoder that transformers has written in several ways: nested, rotary positions, end tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from owl2.export.checkpoint.keys import CONFIG, NESTED, Json
from owl2.runtime.config import DecoderConfig, RopeScaling, require
from owl2.runtime.foreign import listed, shorten

DEFAULT = DecoderConfig()
LAYER_TYPE = "_attention"
"""What the keys of rotary parameters by type of layer end with."""
ROPE_KEYS = {"type", "rope_type", "rope_theta", "factor"}
ROPE_IDLE = {"original_max_position_embeddings": None, "partial_rotary_factor": 1, "attention_factor": 1}
"""Keys that change nothing with this value; None stands for the model's max_position_embeddings."""


def decoder_object(config: Json) -> Json:
    """The decoder's keys, from the top of config.json and from a nested object.

    Raises:
        ConfigError: the two say different things.
    """
    keys = dict(config)
    for name in NESTED:
        nested = config.get(name) or {}
        require(isinstance(nested, Mapping), f"config.json: {name} must be an object, got {shorten(nested)}")
        for key, value in nested.items():
            if key not in CONFIG.obeyed or key == "model_type":
                continue
            require(
                keys.get(key) in (None, value),
                f"config.json: {key} is {shorten(keys.get(key))} at the top and {shorten(value)} in {name}; make them "
                "agree",
            )
            keys[key] = value
    return keys


def rope(keys: Json) -> tuple[float, RopeScaling | None]:
    """theta and the stretching of rotary positions, from ``rope_theta``, ``rope_scaling`` and ``rope_parameters``.

    Raises:
        ConfigError: they contradict each other, or ask for something else than linear or dynamic stretching.
    """
    found: dict[str, RopeScaling | None] = {}
    thetas = {"rope_theta": keys["rope_theta"]} if keys.get("rope_theta") is not None else {}
    for name in ("rope_scaling", "rope_parameters"):
        given = keys.get(name)
        if given is None or given == {}:
            continue
        given = _of_all_layers(name, given)
        found[name] = _scaling(name, given, keys.get("max_position_embeddings", DEFAULT.max_position_embeddings))
        if given.get("rope_theta") is not None:
            thetas[f"{name}.rope_theta"] = given["rope_theta"]
    for name, theta in thetas.items():
        right = isinstance(theta, int | float) and not isinstance(theta, bool) and theta > 0
        require(right, f"config.json: {name} must be a positive number, got {shorten(theta)}")
    for what, values in (("rope_theta", thetas), ("rotary positions", found)):
        distinct = list(values.values())
        require(
            all(value == distinct[0] for value in distinct),
            f"config.json: {' and '.join(values)} give different {what}; keep the one that the model was trained with",
        )
    theta = next(iter(thetas.values()), DEFAULT.rope_theta)
    return float(theta), next(iter(found.values()), None)


def _of_all_layers(name: str, given: object) -> Json:
    """Rotary parameters, which may be given by type of layer; all layers of this family are of one type."""
    require(isinstance(given, Mapping), f'config.json: {name} must be {{"rope_type": …, …}}, got {shorten(given)}')
    assert isinstance(given, Mapping)
    by_type = [key for key in given if str(key).endswith(LAYER_TYPE)]
    if not by_type:
        return given
    require(
        by_type == list(given) == ["full_attention"] and isinstance(given["full_attention"], Mapping),
        f"config.json: {name} is given for {listed(given)}; all layers of this family are full_attention",
    )
    return dict(given["full_attention"])


def _scaling(name: str, given: Json, positions: object) -> RopeScaling | None:
    old, new = given.get("type"), given.get("rope_type")
    require(
        old is None or new is None or old == new,
        f"config.json: {name} has type {shorten(old)} and rope_type {shorten(new)}; keep the one that the model was "
        "trained with",
    )
    kind: Any = new if old is None else old
    if kind is None and "factor" not in given:
        kind = "default"
    require(
        kind in ("default", "linear", "dynamic"),
        f"config.json: {name} has type {shorten(kind)}; default, linear and dynamic can be converted",
    )
    neutral = {**ROPE_IDLE, "original_max_position_embeddings": positions}
    for key in sorted(set(given) - ROPE_KEYS):
        value = given[key]
        require(
            value is None or (key in neutral and value == neutral[key]),
            f"config.json: {name} has {shorten(key)} {shorten(value)}, which cannot be converted",
        )
    factor: Any = given.get("factor")
    if kind == "default":
        require(factor in (None, 1), f"config.json: {name} has type default and factor {shorten(factor)}; give one")
        return None
    right = isinstance(factor, int | float) and not isinstance(factor, bool)
    require(right, f"config.json: {name} of type {kind} needs a factor, a number, got {shorten(factor)}")
    return RopeScaling(kind, float(factor))


def end_ids(config: Json, generation: Json) -> tuple[int, ...]:
    """Ids that end an answer: those of generation_config.json, else those of config.json.

    Raises:
        ConfigError: they are no ids, or versions of transformers disagree about which file counts.
    """
    file = "generation_config.json" if "eos_token_id" in generation else "config.json"
    given = (generation if "eos_token_id" in generation else config).get("eos_token_id", DEFAULT.eos_token_ids)
    ids = _ids(file, given)
    other = config.get("eos_token_id")
    # transformers 4.31 reads a file of this origin from config.json again, later versions do not.
    if file == "generation_config.json" and generation.get("_from_model_config") is True and other is not None:
        require(
            set(ids) == set(_ids("config.json", other)),
            f"{file}: eos_token_id is {shorten(given)}, but {shorten(other)} in config.json, from which the file was "
            "made (_from_model_config); make them agree",
        )
    return tuple(dict.fromkeys(ids))


def _ids(file: str, given: object) -> list[int]:
    ids: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    right = ids and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids)
    require(bool(right), f"{file}: eos_token_id must be an id or a list of ids, got {shorten(given)}")
    return ids
