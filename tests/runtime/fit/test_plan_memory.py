"""The estimate of memory against what processes really hold, with ONNX Runtime's CPU provider.

Processes are measured as Linux counts them: RssAnon, memory of their own, and VmRSS, with the code they mapped.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from owl2 import plan
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.ort_dialect import OrtDialect
from owl2.export.graph.weights import DenseWeight, IntegerWeight, Linear, LinearWeight
from owl2.quant.grid import QuantizedWeight
from owl2.quant.layer import LINEARS
from owl2.runtime import spec
from owl2.runtime.config import DecoderConfig
from owl2.runtime.fit.plan import Plan
from owl2.runtime.spec import WeightType
from owl2.runtime.verification import FileEntry

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")

DECODER = DecoderConfig(
    vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8
)
CONTEXT = 768
MIB = 1 << 20
SESSION = 12 * MIB
"""What a session of ONNX Runtime takes besides, at most."""
READ = """
import re, sys, json
from pathlib import Path
import numpy as np

def held(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
"""
RUN_DECODER = """
from owl2.runtime.backends.ort.engine import OrtDecoder, OrtOptions
from owl2.runtime.config import DecoderConfig, from_json

config = from_json(DecoderConfig, json.loads(sys.argv[2]), "decoder")
context, block = int(sys.argv[3]), 256
before = held("RssAnon")
decoder = OrtDecoder(Path(sys.argv[1]), config, OrtOptions(threads=1))
loaded = held("RssAnon") - before
buffers = decoder.allocate(context, None)
for past in range(0, context, block):
    embeds = np.ones((block, config.hidden_size), np.float32)
    modality = (np.arange(block) % 4 == 0).astype(np.int64)
    decoder.prefill(embeds, modality, past, buffers, np.array([block - 1]))
print(json.dumps([loaded, held("RssAnon") - before - loaded]))
"""
CHAT = """
from owl2 import ContextOverflowError, Owl2

# A first load hashes, which leaves some MiB.
owl = Owl2.load(sys.argv[1], threads=1, verify=True, backend="onnxruntime", kv_cache="fp32")
chat = owl.chat()
images = [np.full((90, 90, 3), 90 * i, np.uint8) for i in range(2)]
try:
    while True:
        chat.ask("What is it?" + " word" * 60, images, max_new_tokens=60).text
        images = ()
except ContextOverflowError:
    print(json.dumps(held("VmRSS")))
"""


def measured(script: str, *arguments: object) -> object:
    command = [sys.executable, "-c", READ + script, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


def random_weight(weights: WeightType, rows: int, columns: int) -> LinearWeight:
    if weights == "int4":
        codes = torch.randint(-7, 8, (rows, columns), dtype=torch.int8)
        return IntegerWeight(QuantizedWeight(codes, torch.full((rows, columns // 128), 0.01), 4, 128))
    return DenseWeight(torch.randn(rows, columns) * 0.02, "fp16")


def write_decoder(path: Path, weights: WeightType) -> None:
    """Random weights in the shapes of ``DECODER``."""
    width, inner = DECODER.hidden_size, DECODER.intermediate_size
    wide = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    gains = (torch.ones(width), torch.ones(width))
    with GraphBuilder(path) as graph:
        writer = DecoderGraph(OrtDialect(graph), DECODER)
        for layer in range(DECODER.num_hidden_layers):
            linears = {
                name: Linear(f"layers.{layer}.{name}", random_weight(weights, *wide.get(name, (width, width))))
                for name in LINEARS
            }
            writer.layer(linears, {"input_layernorm": gains, "post_attention_layernorm": gains})
        writer.finish(gains[0], random_weight(weights, DECODER.vocab_size, width))


@pytest.fixture(scope="module")
def planned(sample_bundle: Path) -> Plan:
    """The sample bundle on this machine's CPU, at its full context with two images."""
    return plan(sample_bundle, device="cpu", kv_cache="fp32", images=2, backend="onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize(("stored_as", "most"), [("int4", 1.06), ("fp16", 1.22)])
def test_a_decoder_takes_what_is_estimated(planned: Plan, tmp_path: Path, stored_as: WeightType, most: float) -> None:
    """int4 weights are in memory once, float16 ones in float32; a session takes a few MiB in addition.

    Converting float16 leaves gaps in the arena, up to a fifth with matrices as small as these (none at full size),
    which a prefill then uses: in all it is as estimated.
    """
    path = tmp_path / spec.DECODER_GRAPH
    write_decoder(path, stored_as)
    manifest = planned.manifest
    size = path.with_name(path.name + ".data").stat().st_size
    manifest = replace(
        manifest,
        model=replace(manifest.model, decoder=DECODER),
        weights=replace(manifest.weights, decoder=stored_as, head=stored_as, group_size=128),
        files={**manifest.files, f"{spec.DECODER_GRAPH}.data": FileEntry(size, "")},
    )
    parts = {part.name: part for part in replace(planned, manifest=manifest, context=CONTEXT, images=1).parts}
    shape = json.dumps({name: getattr(DECODER, name) for name in DECODER.__slots__})
    loaded, grown = np.array(measured(RUN_DECODER, path, shape, CONTEXT))
    weights, kv, prefill = (parts[name] for name in ("decoder weights", "K/V cache", "prefill"))
    assert weights.least - 2 * MIB < loaded < most * weights.size + SESSION
    assert grown > kv.least + prefill.least
    estimated = weights.size + kv.size + prefill.size
    assert 0.85 * estimated < loaded + grown < 1.15 * estimated + SESSION


def test_the_sample_bundle_takes_what_is_estimated(planned: Plan, sample_bundle: Path) -> None:
    """A conversation up to the end of the context; nine tenths of so small a model are Python and its libraries."""
    resident = measured(CHAT, sample_bundle)
    assert resident == pytest.approx(planned.needed, rel=0.2)
