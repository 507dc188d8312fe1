"""One export, whatever it writes: what it works with, and what happens before and after its writer's part."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.checkpoint.modules import check_head, fits_float16
from owl2.export.checkpoint.scoring import preset_of
from owl2.export.checkpoint.source import check_settings, remaining, source_record
from owl2.export.config import ExportConfig
from owl2.export.job.device import check_device
from owl2.export.job.disk import write_json
from owl2.export.job.progress import Reporter
from owl2.export.job.staging import Staging
from owl2.export.job.usage import Usage
from owl2.export.prompts import Prompts, load_prompts
from owl2.export.report import CalibrationRecord, Checks, PartReport, Report
from owl2.quant.layer import ModuleReport
from owl2.quant.models.mplug_owl2 import Owl2Model
from owl2.runtime import spec
from owl2.runtime.config import ModelConfig, require
from owl2.runtime.errors import ExportError
from owl2.runtime.spec import BYTES_PER_VALUE, FloatType

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ExportJob:
    """Settings, open checkpoint and tools of one export."""

    config: ExportConfig
    checkpoint: Checkpoint
    prompts: Prompts
    staging: Staging
    usage: Usage
    reporter: Reporter

    @property
    def folder(self) -> Path:
        """The folder that becomes the target."""
        return self.staging.folder

    @property
    def model(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def layers(self) -> int:
        return self.model.decoder.num_hidden_layers

    @property
    def preset(self) -> str:
        """With which the model scores images."""
        return preset_of(self.config, self.checkpoint.preset)

    @cached_property
    def embeddings(self) -> FloatType:
        """Type of the token table in a bundle: that of the settings, or fp32 where float16 does not hold it."""
        wanted = self.config.types.embeddings
        return wanted if wanted == "fp32" or fits_float16(self.checkpoint) else "fp32"

    @property
    def size(self) -> int:
        """Bytes of the result, within a few percent."""
        types = self.config.types
        with torch.device("meta"):
            shapes = {name: tuple(parameter.shape) for name, parameter in Owl2Model(self.model).named_parameters()}
        stored = {"model.embed_tokens.": self.embeddings, "lm_head.": types.head, "model.layers.": types.decoder}
        total = 0.0
        for name, shape in shapes.items():
            count = float(np.prod(shape))
            weight_type = next((value for prefix, value in stored.items() if name.startswith(prefix)), types.vision)
            if len(shape) != 2:
                weight_type = "fp32"
            elif weight_type in ("int4", "int8") and self.config.quant is not None:
                total += 4 * count / self.config.group_size
            total += BYTES_PER_VALUE[weight_type] * count
        return int(total)

    @contextlib.contextmanager
    def writing(self, needed: int) -> Iterator[None]:
        """Enter the staging folder; errors say how much space is needed, and what is kept for the next export."""
        staging = self.staging
        try:
            with staging:
                yield
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise ExportError(self._no_space(needed)) from error
            if staging.kept and staging.left not in str(error):
                self.reporter.note(staging.left)
            raise

    def check_space(self, needed: int) -> None:
        """Raise ExportError if less than ``needed`` bytes, minus those of files that exist already, are free."""
        if shutil.disk_usage(self.staging.target.parent).free < needed - self.staging.used:
            raise ExportError(self._no_space(needed))

    def _no_space(self, needed: int) -> str:
        parent = self.staging.target.parent
        return (
            f"not enough space in {parent}: the export takes about {needed / 1e6:.0f} MB, "
            f"{shutil.disk_usage(parent).free / 1e6:.0f} MB are free; make room or write to another disk. "
            f"{self.staging.left}"
        )

    def write_report(
        self, checks: Checks, modules: Mapping[str, ModuleReport], vision: tuple[PartReport, ...] = ()
    ) -> Report:
        """Write ``report.json``, once all other files but the manifest are complete; see :class:`Report`."""
        config, types = self.config, self.config.types
        quant = config.quant if remaining(self.checkpoint) else None
        report = Report(
            # The settings as they took effect; paths of the machine stay out.
            recipe={
                "source": source_record(self.checkpoint),
                "purpose": config.purpose,
                "weights": config.weights,
                "head": types.head,
                "vision": types.vision,
                "dialect": config.dialect,
                "activations": types.activations,
                "embeddings": self.embeddings,
                "quant": None if quant is None else asdict(quant),
                "samples": config.samples,
                "device": config.device,
            },
            calibration=CalibrationRecord.of(self.prompts),
            parity=checks.parity,
            accuracy=checks.accuracy,
            goldens=checks.goldens,
            kv_int8=checks.kv_int8,
            modules=modules,
            vision=vision,
            size=sum(path.stat().st_size for path in self.folder.iterdir()),
            seconds=round(self.usage.seconds, 2),
            layer_seconds=tuple(self.usage.layer_seconds),
            peak_memory=self.usage.peak,
            peak_own_memory=self.usage.own_peak,
        )
        write_json(self.folder / spec.REPORT, report.to_json())
        return report


@contextlib.contextmanager
def open_job(config: ExportConfig, reporter: Reporter) -> Iterator[ExportJob]:
    """Check everything that can be checked before anything is written, and load the prompts."""
    staging = Staging(config.bundle, source=config.checkpoint, overwrite=config.overwrite)
    if config.layout == "gptq" and staging.unfinished and not config.fresh:
        raise ExportError(
            f"{staging.work} holds an unfinished export of a bundle, which would be lost; finish it with its own "
            "command, choose another folder, or give --fresh to remove it"
        )
    check_device(config.device)
    opened = Checkpoint(config.checkpoint, base_preprocessor=config.base_preprocessor, adapter=config.lora)
    with Usage() as usage, opened as checkpoint:
        check_settings(config, checkpoint)
        check_head(checkpoint)
        job = ExportJob(config, checkpoint, load_prompts(config, checkpoint), staging, usage, reporter)
        _tell(job)
        yield job


def _tell(job: ExportJob) -> None:
    """What the user should know before the work begins.

    Raises:
        ConfigError: the token table does not fit the activations.
    """
    for note in job.checkpoint.notes:
        job.reporter.note(f"{job.config.checkpoint}: {note}")
    if job.config.layout == "bundle" and job.preset and not job.config.preset:
        says = "says that it scores images" if job.checkpoint.preset else "does not say how it is asked"
        more = "" if job.config.purpose == "scoring" else "; --for scoring calibrates it for that"
        job.reporter.note(
            f"its name {says}: scores will be asked for as in the preset {job.preset} (--preset chooses another){more}"
        )
    if job.config.layout == "bundle" and job.embeddings != job.config.types.embeddings:
        require(
            job.config.types.activations == "fp32",
            "the token table holds values that float16 does not; export with --activations fp32",
        )
        job.reporter.note("the token table holds values that float16 does not, and is stored as fp32")
