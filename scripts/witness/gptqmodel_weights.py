"""Quantize a checkpoint folder with gptqmodel and save the weights that its integers stand for.

Runs in an environment of its own with gptqmodel, on the same text and windows as ``quantizers.py``, which takes the
result as ``--compare NAME=FILE``:

    export GPTQMODEL_CPU_WORKERS=2  # on a machine with only two cores
    python scripts/witness/gptqmodel_weights.py MODEL calibration.txt gar.safetensors --group-size 128
    python scripts/witness/gptqmodel_weights.py MODEL calibration.txt mse.safetensors --group-size 128 --mse 2.4
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from windows import token_windows


def weight_of(module: Any, name: str, original: Tensor) -> Tensor:  # noqa: ANN401 - gptqmodel has no types
    """The weight [N, K] that a packed module's integers stand for.

    Raises:
        SystemExit: the integers were read with a wrong zero point.
    """
    scales = module.scales.float()[module.g_idx.long()]
    # The module multiplies in float16; its integers are exact.
    codes = (module.dequantize_weight().float() / scales).round()
    if module.qzero_format() == 1:  # this format stores zero points less one, which dequantize_weight takes as they are
        codes -= 1
    weight: Tensor = codes * scales
    shift = float(((weight - original.T) / scales).mean())
    if not abs(shift) < 0.25:
        raise SystemExit(f"{name}: the integers are {shift:+.2f} steps above the original on average; expected 0")
    return weight.T.contiguous()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("calibration", type=Path, help="text file")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--mse", type=float, default=0.0, help="exponent of its clip search; 0 for none")
    parser.add_argument("--damp", type=float, help="damping; gptqmodel's default if not given")
    parser.add_argument("--no-gar", action="store_true", help="columns in their stored order")
    options = parser.parse_args()

    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from safetensors import safe_open
    from safetensors.torch import save_file

    windows = token_windows(options.model, options.calibration, options.sequences, options.length)
    config = QuantizeConfig(
        bits=4,
        group_size=options.group_size,
        sym=True,
        desc_act=False,
        act_group_aware=not options.no_gar,
        mse=options.mse,
        damp_percent=options.damp,
        offload_to_disk=False,
        device="cpu",
    )
    print(config, flush=True)
    model = GPTQModel.load(str(options.model), config, dtype=torch.float32)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    started = time.perf_counter()
    model.quantize(samples, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    print(f"quantized in {time.perf_counter() - started:.0f} s", flush=True)
    with safe_open(options.model / "model.safetensors", "pt") as original:
        weights = {
            f"{name}.weight": weight_of(module, name, original.get_tensor(f"{name}.weight"))
            for name, module in model.model.named_modules()
            if hasattr(module, "qweight")
        }
    save_file(weights, options.out)
    print(f"{options.out}: {len(weights)} weights", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
