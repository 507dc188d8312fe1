"""The weights that training starts from: fan-in scale, and an abstractor that attends to the nine cells.

With small weights everywhere (standard deviation 0.02) the model learned colours only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from world import GRID

from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.quant.models.mplug_owl2.abstractor import grid_positions

# Contributions of each layer to the residual stream are damped, so that they do not add up with the depth.
DAMPED = ("self_attn.dense.weight", "mlp.fc2.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight")


def _centred_positions(width: int, cells: int) -> Tensor:
    """2-D sine positions of the patches minus their mean, each of unit variance: [cells², width]."""
    table = grid_positions(width, cells, False)
    table = table - table.mean(0)
    return table / table.std(1, keepdim=True)


def _look_at_cells(parameters: dict[str, nn.Parameter], table: Tensor, heads: int) -> None:
    """Let the attention of the abstractor start as a comparison of positions.

    The positions of the patches span few dimensions. Keys start as the coordinates in these; each learned query holds
    the coordinates of the centre of its cell in other dimensions, so that queries do not attend to each other, and its
    projection reads them from there.
    """
    patches, width = table.shape
    basis = torch.linalg.svd(table, full_matrices=True).Vh.T
    rank = min(width // heads, 24)
    seen, hidden = basis[:, :rank], basis[:, -rank:]
    side = math.isqrt(patches) // GRID
    centres = (table @ seen).view(GRID, side, GRID, side, rank).mean((1, 3)).flatten(0, 1)
    queries = (centres - centres.mean(0)) @ hidden.T
    parameters["query_embeds"].data[0] = queries / queries.std(1, keepdim=True)
    for name, parameter in parameters.items():
        if name.endswith(("attention.query.weight", "attention.key.weight")):
            torch.manual_seed(0)  # the same spread over the heads for queries and keys
            spread = torch.cat([nn.init.orthogonal_(torch.empty(width // heads, rank)) for _ in range(heads)])
            coordinates = hidden if "query" in name else seen
            parameter.data = 0.2 * parameter.data + spread @ coordinates.T


def initialise(model: Owl2Model, seed: int) -> None:
    """Set all weights except norms, which keep their ones and zeros."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue
        fan_in = 1 if "embed_tokens" in name else math.prod(parameter.shape[1:])
        nn.init.normal_(parameter, std=(0.5 if name.endswith(DAMPED) else 1.0) / math.sqrt(fan_in))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        if "_proj.multiway.1." in name:
            parameter.data.copy_(parameters[name.replace("multiway.1", "multiway.0")].data)
    vision, abstractor = "model.vision_model.embeddings.", "model.visual_abstractor."
    nn.init.normal_(parameters[f"{vision}cls_token"], std=0.5)
    nn.init.normal_(parameters[f"{abstractor}vit_eos"], std=1.0)
    table = _centred_positions(model.config.vision.hidden_size, model.config.vision.grid)
    positions = parameters[f"{vision}position_embedding"].data
    positions.zero_()
    positions[0, 1:] = 0.5 * table
    inner = {n.removeprefix(abstractor): p for n, p in parameters.items() if n.startswith(abstractor)}
    _look_at_cells(inner, table, model.config.abstractor.num_attention_heads)
