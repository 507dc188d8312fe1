"""The way from a checkpoint to a bundle, on one screen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from owl2.export.checkpoint.naming import TABLE
from owl2.export.checks.bundle import check_bundle
from owl2.export.checks.kv_int8 import can_be_checked
from owl2.export.config import ExportConfig
from owl2.export.decoder import ExportedDecoder, export_layers
from owl2.export.graph.builder import GraphBuilder
from owl2.export.graph.decoder import DecoderGraph
from owl2.export.graph.dialect import DIALECTS
from owl2.export.graph.kv_int8 import write_int8_kv_graph
from owl2.export.job.disk import write_json
from owl2.export.job.job import ExportJob, open_job
from owl2.export.job.journal import Journal, journal_size
from owl2.export.job.progress import Reporter, Silent
from owl2.export.job.written_bundle import WrittenBundle
from owl2.export.prompts import digests
from owl2.export.report import Report
from owl2.export.streams import Embedded, Streams, begin_streams
from owl2.export.vision import ExportedVision, export_vision
from owl2.runtime import spec


def export_bundle(config: ExportConfig, reporter: Reporter | None = None) -> Report:
    """Convert a checkpoint; the bundle appears whole, or not at all.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used.
        CalibrationError, QuantizationError: the weights cannot be quantized with this data.
        ParityError: a graph does not compute what torch computes.
        ExportError: the target exists, or the disk is full.
    """
    with open_job(config, reporter or Silent()) as job:
        needed = job.size + journal_size(job)
        with job.writing(needed):
            journal = Journal(job)
            journal.resume()
            job.check_space(needed)
            job.checkpoint.tokenizer.write(job.checkpoint.folder, job.folder)
            vision = journal.vision()
            if vision is None:
                vision = export_vision(job)
                journal.keep_vision(vision)
            streams, probes = _embed(job, vision)
            # Make room for the layers: they need no pixels, and no rows of the calibration images.
            probe_images = job.prompts.images_of(job.prompts.probes)
            job.prompts.images.clear()
            rows = {digest: vision.rows[digest] for digest in digests(job.prompts.measured)}
            vision = replace(vision, original={}, rows=rows)
            decoder = _export_decoder(job, journal, streams)
            del streams
            kv_cache = config.types.kv_cache
            if "int8" in kv_cache and can_be_checked():
                graph, int8_graph = job.folder / spec.DECODER_GRAPH, job.folder / spec.DECODER_GRAPHS["int8"]
                write_int8_kv_graph(graph, int8_graph, job.model.decoder, decoder.kv_scales)
            else:
                kv_cache = (config.types.activations,)
            bundle = WrittenBundle.of(job, kv_cache)
            checks = check_bundle(job, bundle, decoder, vision, probes, probe_images)
            report = job.write_report(checks, decoder.modules, vision.sensitivity)
            write_json(job.folder / spec.MANIFEST, bundle.manifest().sealed())
            job.staging.publish()
    return report


def _embed(job: ExportJob, vision: ExportedVision) -> tuple[Streams, list[Embedded]]:
    """Write the token table, and begin with all prompts before the first layer."""
    table = job.checkpoint.tensor(TABLE).numpy()
    dtype = np.float16 if job.embeddings == "fp16" else np.float32
    with (job.folder / spec.EMBEDDINGS).open("wb") as file:
        for block in np.array_split(table, max(1, len(table) // 4096)):
            file.write(block.astype(dtype).tobytes())
    return begin_streams(job, table, vision.original, vision.rows)


def _export_decoder(job: ExportJob, journal: Journal, streams: Streams) -> ExportedDecoder:
    """Write ``decoder.onnx``, from the layer on that ``journal`` ends with."""
    config, first = job.config, journal.layers
    path = job.folder / spec.DECODER_GRAPH
    with GraphBuilder(path, config.types.activations, resume=first > 0) as graph:
        writer = DecoderGraph(DIALECTS[config.dialect](graph), job.model.decoder)
        modules = journal.restore_layers(writer, streams.restore) if first else {}

        def keep() -> None:
            journal.keep_layer(writer, streams.arrays(), modules)

        return export_layers(job, writer, streams, modules, first=first, keep=keep)
