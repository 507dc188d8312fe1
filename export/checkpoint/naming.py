"""From the names that tensors have in a file to those of the official layout."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from owl2.runtime.errors import CheckpointError
from owl2.runtime.foreign import listed, shorten

# The token table is in every checkpoint, and only once: what is in front of it is in front of all.
ANCHOR = "embed_tokens.weight"
BODY, HEAD = "model.", "lm_head."
TABLE, HEAD_WEIGHT = f"{BODY}{ANCHOR}", f"{HEAD}weight"
"""Official names of the token table [V, C] and of the output head's weight [V, C]."""
# Buffers that some versions of transformers store; their values follow from config.json.
BUFFERS = re.compile(
    r"(.*\.)?(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|causal_mask|masked_bias|num_batches_tracked)"
)
OPTIONAL_SUFFIXES = (".q_pos_embed", ".k_pos_embed")
"""Of buffers that a checkpoint may have or not."""
# Not worth a word: transformers has always written it.
USUAL_BUFFER = ".rotary_emb.inv_freq"
OPTIMIZER = re.compile(
    r"(optimizer|optim|lr_scheduler|scheduler|grad_scaler)\..*|.*\.(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)"
)
ADAPTER = re.compile(r".*\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b.*")
ADAPTER_EFFECT = re.compile(r".*\.lora_(embedding_)?B\b.*")
"""Where these are zero, the adapter changes nothing."""


@dataclass(frozen=True)
class Names:
    """Names of a checkpoint's tensors.

    Attributes:
        stored: name in the file by official name, of everything that may be a weight.
        idle: names in the file of what no model computes with, but the adapter's tensors.
        adapter: names in the file of the tensors of a LoRA adapter.
        note: how the names were converted; empty where they are official.
    """

    stored: dict[str, str]
    idle: list[str] = field(default_factory=list)
    adapter: list[str] = field(default_factory=list)
    note: str = ""


def official_names(names: Iterable[str], where: str) -> Names:
    """Find the one conversion that gives the names of the official layout.

    Wrappers put something in front of all names (``module.``, ``base_model.model.``), and the inner model of
    transformers is saved without the leading ``model.``.

    Raises:
        CheckpointError: more than one conversion could be meant.
    """
    names = sorted(names)
    anchors = [name for name in names if name == ANCHOR or name.endswith(f".{ANCHOR}")]
    if BODY + ANCHOR in anchors or not anchors:
        body, head = BODY, ""
    elif len(anchors) > 1:
        raise CheckpointError(
            f"{where}: {listed(anchors)} could each be the token table, so which model is meant is not certain; keep "
            f"the tensors of one, named {BODY}{ANCHOR}"
        )
    else:
        body = anchors[0].removesuffix(ANCHOR)
        heads = {name[: name.index(HEAD)] for name in names if name.startswith(HEAD) or f".{HEAD}" in name}
        if len(heads) > 1:
            raise CheckpointError(
                f"{where}: output heads are under {listed(map(repr, sorted(heads)))}, so which one is meant is not "
                f"certain; keep the tensors of one model, named {HEAD}weight"
            )
        head = heads.pop() if heads else body.removesuffix(BODY)
    stored: dict[str, str] = {}
    idle, adapter = list[str](), list[str]()
    for name in names:
        if ADAPTER.fullmatch(name):
            adapter.append(name)
        elif OPTIMIZER.fullmatch(name) or (BUFFERS.fullmatch(name) and not name.endswith(USUAL_BUFFER)):
            idle.append(name)
        else:
            official = _official(name, body, head)
            if official in stored:
                raise CheckpointError(
                    f"{where}: {listed([stored[official], name])} would both be {official}, so which one is meant is "
                    "not certain; keep the tensors of one model"
                )
            stored[official] = name
    note = ""
    if (body, head) != (BODY, ""):
        note = f"tensors named as {shorten(anchors[0])} are read as {BODY}{ANCHOR}, and all others alike"
    return Names(stored, idle, adapter, note)


def _official(name: str, body: str, head: str) -> str:
    if name.startswith(head + HEAD):
        return name.removeprefix(head)
    return BODY + name.removeprefix(body) if name.startswith(body) else name
