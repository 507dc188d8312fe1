"""Train the sample model from scratch, in the stages of the paper, on the scenes of ``world``.

Stage "language" stands for the pretrained language model that the paper starts from: the decoder's text side learns
the language of the little world from text only (scenes in words, questions, facts). Then come the two stages of the
paper: "vision" trains the vision tower, the abstractor and the image branches (image keys, values and norms) with the
language side frozen; "all" trains everything on image and text tasks together.

``--start CHECKPOINT`` trains a finished model further instead: everything together, with more of what is learned late
(relations, ratings of quality), at half the rate.

The run is resumable: the state (weights, optimizers, step, time spent) is written every few minutes. Examples depend on
the seed and the step; their mix and the learning rate depend on the share of the time that is spent.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from batches import Batch, Mix, batches
from checkpoints import save_checkpoint
from encoder import Encoder, train_tokenizer
from initial import initialise
from network import predictions, sample_config
from probes import SKILLS, exact_share, probes
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel

from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.quant.models.mplug_owl2 import Owl2Model

ALL_SKILLS = {
    "colour": 1.5,
    "shape": 1.2,
    "count": 1.0,
    "relation": 2.5,
    "place": 3.0,
    "size": 0.5,
    "presence": 0.4,
    "second": 0.8,
    "caption": 0.5,
}
POOL = 16
WARM_UP_SECONDS = 20.0
CLIP = 1.0
MUON_FACTOR = 1.5  # how much larger the rate of the matrices is


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run: its share of the time, the parameters it trains, its mix, and its first and last rate."""

    name: str
    share: float
    trained: Callable[[str], bool]
    mix: Callable[[float], Mix]
    rate: tuple[float, float]


def is_image_branch(name: str) -> bool:
    """Whether a parameter belongs to the vision side or to a decoder branch for image rows."""
    return ".vision_model." in name or ".visual_abstractor." in name or "multiway.1." in name


def language_mix(progress: float) -> Mix:
    """Text only; scenes become larger."""
    counts = (1.0, 1.0, max(0.0, 2 * progress), max(0.0, 3 * progress - 1))
    return Mix(0, 0.9, 0.1, 0, counts, ALL_SKILLS | {"caption": 1.0}, 5)


def vision_mix(progress: float) -> Mix:
    """Captions first; scenes become larger."""
    counts = (1.0, 3 * progress, 3 * progress * progress, max(0.0, 4 * progress - 2))
    skills = {skill: weight * min(1.0, 0.2 + progress) for skill, weight in ALL_SKILLS.items()}
    return Mix(0.95, 0, 0, 0.05, counts, skills | {"caption": 3.0 - 2.0 * progress}, 4)


def full_mix(progress: float) -> Mix:
    """Everything; captions, which say most about the things of a scene, are frequent at first."""
    early = min(1.0, max(0.0, (0.7 - progress) / 0.4))
    counts = (1.0, 1.5 + 1.5 * early, 2.0, 2.0 - early)
    return Mix(0.85, 0.03, 0.02, 0.10, counts, ALL_SKILLS | {"caption": 1.0 + 2.5 * early}, 4)


STAGES = (
    Stage("language", 0.10, lambda name: not is_image_branch(name), language_mix, (1.0, 0.5)),
    Stage("vision", 0.10, is_image_branch, vision_mix, (1.0, 0.6)),
    Stage("all", 0.80, lambda name: True, full_mix, (0.8, 0.0)),
)


def refine_mix(progress: float) -> Mix:
    """Everything, with more of the skills that are learned last."""
    skills = ALL_SKILLS | {"colour": 0.8, "relation": 4.0, "second": 1.2, "caption": 1.5}
    return Mix(0.68, 0.06, 0.02, 0.24, (1.0, 1.5, 2.0, 2.0), skills, 4)


REFINE = (Stage("refine", 1.0, lambda name: True, refine_mix, (0.5, 0.0)),)


class Run:
    """The state of one worker of a training run; all workers hold the same weights after every step."""

    def __init__(self, options: argparse.Namespace, worker: int) -> None:
        self.worker = worker
        self.folder: Path = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.options = options
        self.stages = STAGES if options.start is None else REFINE
        self.encoder = Encoder(self.folder / "tokenizer.model")
        self.model = Owl2Model(sample_config())
        if options.start is None:
            initialise(self.model, options.seed)
        else:
            with Checkpoint(options.start) as checkpoint:
                checkpoint.load_into(self.model, "")
        self.rows = self.model.config.rows_per_image
        self.budget = options.minutes * 60.0
        self.spent, self.step, self.samples, self.stage = 0.0, 0, 0, -1
        self.last_seconds = 0.0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.queue: list[Batch] = []

    def enter(self, stage: int) -> None:
        """Choose the stage's parameters and make new optimizers for them."""
        self.stage = stage
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.stages[stage].trained(name))
            if parameter.requires_grad:
                flat = "embed" in name or "lm_head" in name or parameter.dim() != 2
                (others if flat else matrices).append(parameter)
        # Every worker updates its share of the matrices and sends them to the others.
        matrices.sort(key=torch.Tensor.numel)
        self.shares = [matrices[w :: self.options.workers] for w in range(self.options.workers)]
        rate, mine = self.options.rate, self.shares[self.worker]
        self.optimizers = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
            torch.optim.Muon(mine, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        ]
        self.queue = []
        self.log({"enter": self.stages[stage].name})

    def save(self) -> None:
        """Write the whole state under a temporary name, then rename it."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "numbers": (self.spent, self.step, self.samples, self.stage),
        }
        path = state_path(self.folder, self.worker)
        temporary = path.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(path)

    def resume(self) -> None:
        """Continue from a written state; the number of workers must be the same."""
        state = torch.load(state_path(self.folder, self.worker), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.spent, self.step, self.samples, stage = state["numbers"]
        self.enter(stage)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    def log(self, record: dict[str, object]) -> None:
        """Append a line to the log and print it; the first worker only."""
        if self.worker:
            return
        line = json.dumps({"minutes": round(self.spent / 60, 2), "step": self.step, "samples": self.samples} | record)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def place(self) -> tuple[int, float]:
        """The current stage, and how far the run has come in it, 0..1."""
        done = self.spent / self.budget
        for index, stage in enumerate(self.stages):
            if done < stage.share or index == len(self.stages) - 1:
                return index, min(1.0, done / stage.share)
            done -= stage.share
        raise AssertionError("unreachable")

    def next_batch(self, progress: float) -> Batch:
        """The next batch, which depends on seed and step; a pool of them is drawn at a time."""
        if not self.queue:
            rng = random.Random(f"{self.options.seed} {self.step} {self.worker}")
            mix = self.stages[self.stage].mix(progress)
            size = self.options.batch // self.options.workers
            self.queue = batches(self.encoder, mix, rng, size, self.rows, POOL)
            # The same order by length in all workers, so that none waits for another.
            random.Random(self.step).shuffle(self.queue)
        return self.queue.pop()

    def train_step(self) -> float:
        """One update; returns the loss."""
        began = time.perf_counter()
        stage, progress = self.place()
        if stage != self.stage:
            self.enter(stage)
        batch = self.next_batch(progress)
        start, end = self.stages[stage].rate
        warm = min(1.0, progress * self.stages[stage].share * self.budget / WARM_UP_SECONDS)
        rate = self.options.rate * warm * (start + (end - start) * progress)
        for optimizer, factor in zip(self.optimizers, (1.0, MUON_FACTOR)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = predictions(self.model, batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        mean_loss, seconds = self.average(loss.item(), self.last_seconds)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.share_matrices()
        self.step += 1
        self.samples += self.options.batch
        self.spent += seconds
        self.last_seconds = time.perf_counter() - began
        return mean_loss

    def average(self, *numbers: float) -> list[float]:
        """Replace gradients by their mean over the workers; returns the means of ``numbers``."""
        if self.options.workers == 1:
            return list(numbers)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in trained if p.grad is not None]
        joined = torch.cat([*(g.flatten() for g in grads), torch.tensor(numbers)])
        dist.all_reduce(joined)
        joined /= self.options.workers
        parts = torch.split(joined, [g.numel() for g in grads] + [len(numbers)])
        for grad, part in zip(grads, parts):
            grad.copy_(part.view_as(grad))
        means: list[float] = parts[-1].tolist()
        return means

    @torch.no_grad()
    def share_matrices(self) -> None:
        """Send every worker's updated matrices to the others."""
        if self.options.workers == 1:
            return
        for owner, share in enumerate(self.shares):
            joined = torch.cat([p.flatten() for p in share])
            dist.broadcast(joined, owner)
            if owner != self.worker:
                for parameter, part in zip(share, torch.split(joined, [p.numel() for p in share])):
                    parameter.copy_(part.view_as(parameter))

    def evaluate(self, count: int) -> None:
        """Log the share of exact answers by skill on held-out questions; the workers divide the skills."""
        skills = ("told", "fact") if self.stages[self.stage].name == "language" else SKILLS
        workers = self.options.workers
        mine = {
            skill: round(exact_share(self.model, self.encoder, probes(skill, count, 1), self.rows), 3)
            for skill in skills[self.worker :: workers]
        }
        everyone: list[dict[str, float]] = [mine] * workers
        if workers > 1:
            dist.all_gather_object(everyone, mine)
        shares = {skill: share for part in everyone for skill, share in part.items()}
        record: dict[str, object] = {"stage": self.stages[self.stage].name}
        self.log(record | {skill: shares[skill] for skill in skills})

    def export(self) -> None:
        """Write the checkpoint in the official layout."""
        if self.options.checkpoint is not None and self.worker == 0:
            save_checkpoint(self.model, self.encoder, self.options.checkpoint)


def state_path(folder: Path, worker: int) -> Path:
    """File of a worker's state."""
    return folder / f"state{worker}.pt"


def train(run: Run) -> None:
    """Train until the time is spent; evaluating and saving do not count."""
    losses: list[float] = []
    logged = evaluated = run.spent
    while run.spent < run.budget:
        losses.append(run.train_step())
        if run.spent - logged > 20:
            left = round((run.budget - run.spent) / 60, 1)
            run.log({"loss": round(sum(losses) / len(losses), 4), "minutes_left": left})
            losses, logged = [], run.spent
        if run.spent - evaluated > run.options.every * 60:
            finish(run, 64)
            evaluated = run.spent
    finish(run, 128)


def finish(run: Run, count: int) -> None:
    """Evaluate, save, export."""
    run.evaluate(count)
    run.save()
    run.export()


def work(worker: int, options: argparse.Namespace) -> None:
    """Train as one of the worker processes."""
    torch.set_num_threads(options.threads)
    if options.workers > 1:
        # A file instead of a port: nothing listens on the network but gloo's own loopback sockets.
        meeting = f"file://{(options.folder / 'meeting').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=worker, world_size=options.workers)
    run = Run(options, worker)
    if state_path(options.folder, worker).exists():
        run.resume()
    train(run)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the sample model; resumes if FOLDER has a state.")
    parser.add_argument("folder", type=Path, help="state, log and tokenizer of the run")
    parser.add_argument("--start", type=Path, help="train this checkpoint further instead of from scratch")
    parser.add_argument("--checkpoint", type=Path, help="also write the model here, in the official layout")
    parser.add_argument("--minutes", type=float, default=90, help="total training time (default 90)")
    parser.add_argument("--every", type=float, default=4, help="minutes between evaluations (default 4)")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step (default 64)")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate (default 3e-3)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "meeting").unlink(missing_ok=True)
    tokenizer = options.folder / "tokenizer.model"
    if not tokenizer.exists() and options.start is not None:
        shutil.copy(options.start / tokenizer.name, tokenizer)
    elif not tokenizer.exists():
        train_tokenizer(tokenizer)
    if options.workers == 1:
        work(0, options)
    else:
        spawn(work, (options,), nprocs=options.workers)  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
