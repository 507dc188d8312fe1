"""The files of a bundle before it has a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from owl2.export.checkpoint.source import GPTQ_CHECKPOINT
from owl2.export.graph.dialect import DIALECTS
from owl2.export.graph.kv_int8 import MINIMUM_ONNXRUNTIME as KV_INT8_ONNXRUNTIME
from owl2.export.job.job import ExportJob
from owl2.runtime import spec
from owl2.runtime.bundle import Manifest, WeightFormat
from owl2.runtime.config import ModelConfig
from owl2.runtime.spec import DialectName, FloatType, KvType
from owl2.runtime.token_table import ArrayTable
from owl2.runtime.verification import FileEntry, hash_file
from owl2.runtime.version import __version__


@dataclass(frozen=True)
class WrittenBundle:
    """Graphs, token table and tokenizer, as an export has written them; fields as in the manifest.

    Attributes:
        kv_cache: types of the K/V cache that have a graph, each with the lowest ONNX Runtime that runs it.
    """

    folder: Path
    model: ModelConfig
    dialect: DialectName
    activations: FloatType
    weights: WeightFormat
    kv_cache: Mapping[KvType, str]
    preset: str = ""

    @classmethod
    def of(cls, job: ExportJob, kv_cache: tuple[KvType, ...]) -> WrittenBundle:
        """The files of ``job``, which have graphs for these types of the K/V cache."""
        config, types, quant = job.config, job.config.types, job.config.quant
        method = "none" if quant is None else quant.method
        weights = WeightFormat(
            decoder=types.decoder,
            head=types.head,
            vision=types.vision,
            embeddings=job.embeddings,
            method=GPTQ_CHECKPOINT if job.checkpoint.quantized else method,
            group_size=0 if quant is None else quant.group_size,
        )
        dialect = DIALECTS[config.dialect]
        versions = {name: KV_INT8_ONNXRUNTIME if name == "int8" else dialect.MINIMUM_ONNXRUNTIME for name in kv_cache}
        return cls(job.folder, job.model, dialect.interface, types.activations, weights, versions, job.preset)

    def path(self, name: str) -> Path:
        return self.folder / name

    def token_table(self) -> ArrayTable:
        """The token table, memory-mapped: nothing else writes to this folder."""
        decoder, dtype = self.model.decoder, np.float16 if self.weights.embeddings == "fp16" else np.float32
        shape = (decoder.vocab_size, decoder.hidden_size)
        return ArrayTable(np.memmap(self.path(spec.EMBEDDINGS), dtype=dtype, mode="r", shape=shape))

    def manifest(self) -> Manifest:
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return Manifest(
            format=spec.FORMAT_VERSION,
            producer=f"owl2 {__version__}",
            dialect=self.dialect,
            activations=self.activations,
            minimum_onnxruntime=self.kv_cache[self.activations],
            kv_cache=self.kv_cache,
            family="mplug_owl2",
            preset=self.preset,
            weights=self.weights,
            model=self.model,
            files={path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in files},
            engines={},
        )
