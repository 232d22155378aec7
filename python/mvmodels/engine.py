"""Training a classifier: the loop behind ``python -m mvmodels.train``, on one process or on many.

Everything that a run computes is a function of its options, the data and the number of processes. Order and sizes of
the batches follow from seed and epoch, what chance does inside a step (dropout, drop path) from seed, step and rank,
the learning rate from the step. So a run that was interrupted and resumed ends where an uninterrupted one ends.
"""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import mvkernels
from mvkernels.report import Progress, UsageError
from mvmodels import checkpoint
from mvmodels.data import Pictures
from mvmodels.options import Average, Options, learning_rate, parameter_groups
from mvmodels.registry import create_model
from mvmodels.sampler import MultiScaleBatchSampler, multi_scale_sizes


def _rows(history: list[Any]) -> bool:
    """Whether these are rows of epochs, all of the same columns."""
    return all(
        isinstance(row, dict)
        and row.keys() == history[0].keys() >= {"epoch", "loss", "accuracy", "seconds"}
        and all(isinstance(value, (int, float)) for value in row.values())
        for row in history
    )


def _same(theirs: Any, mine: Any) -> bool:
    try:
        return bool(theirs == mine)
    except RuntimeError:  # a tensor of a file, which is neither true nor false
        return False


# What a checkpoint has to have for a run to go on, beside the model.
_RESUMED: dict[str, checkpoint.Kind] = {
    "options": (dict, "", lambda options: True),
    "pictures": (list, "", lambda pictures: True),
    "ranks": (int, "", lambda ranks: True),
    "ema": ((dict, type(None)), "", lambda weights: True),
    "optimizer": (dict, "a state", lambda state: isinstance(state.get("state"), dict)),
    "epoch": (int, "0 or more", lambda epoch: epoch >= 0),
    "in_epoch": (int, "0 or more", lambda steps: steps >= 0),
    "step": (int, "0 or more", lambda step: step >= 0),
    "total": (Tensor, "two finite numbers", lambda total: total.shape == (2,) and bool(total.isfinite().all())),
    "history": (list, "a row of each epoch", _rows),
    "best": ((int, float), "a number", math.isfinite),
    "seconds": ((int, float), "a number", math.isfinite),
}


class Trainer:
    """One run. Under a process group every rank makes one; rank 0 writes and reports.

    Args:
        options: what to do.
        train, test: the data; the model gets their classes and channels.
        progress: counts steps.
        board: what has TensorBoard's ``add_scalar(name, value, step)``.
        report: gets the row of each epoch.

    Raises ValueError for options out of range and for an unknown model, BackendUnavailable for a backend that is none.
    """

    def __init__(
        self,
        options: Options,
        train: Pictures,
        test: Pictures,
        progress: Progress | None = None,
        board: Any = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.options, self.train, self.test = options, train, test
        self.progress, self.board, self.report = progress, board, report
        self.many = dist.is_available() and dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if self.many else (0, 1)
        self.device = torch.device(options.device)
        if options.multi_scale is None:
            sizes = [(options.size, options.size, options.batch_size)]
        else:
            low, high = options.scales
            sizes = multi_scale_sizes(
                options.batch_size, options.size, low, high, variable=options.multi_scale == "variable"
            )
        self.sampler = MultiScaleBatchSampler(train, sizes=sizes, ranks=self.ranks, rank=self.rank, seed=options.seed)
        self.steps = sum(len(self.sampler.draws(epoch)) for epoch in range(options.epochs))
        self.warmup = min(self.steps, self.steps // 20 if options.warmup is None else options.warmup)
        self.lr_min = options.lr / 10 if options.lr_min is None else options.lr_min

        torch.manual_seed(options.seed)
        self.settings = {"in_chans": train.channels, **options.settings}
        self.model = create_model(options.model, num_classes=len(train.classes), **self.settings).to(self.device)
        self.average = Average(self.model, options.ema) if options.ema > 0 else None
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, options.weight_decay), lr=options.lr)
        self.parallel = nn.parallel.DistributedDataParallel(self.model) if self.many else self.model

        self.epoch = self.step = self.in_epoch = 0
        self.total = self._counter()
        self.history: list[dict[str, Any]] = []
        self.best = -1.0
        self.seconds = 0.0

    def _counter(self) -> Tensor:
        """Sum of losses and number of pictures in this epoch."""
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(2, dtype=kind, device=self.device)

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; a collective call."""
        return {
            **self._described(),
            "state_dict": checkpoint.detached(self.model),
            "ema": None if self.average is None else checkpoint.detached(self.average.model),
            "optimizer": self.optimizer.state_dict(),
            "options": self.options.identity(),
            "pictures": [len(self.train), len(self.test)],
            "ranks": self.ranks,
            "epoch": self.epoch,
            "in_epoch": self.in_epoch,
            "step": self.step,
            "total": self._sum(self.total).cpu(),
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
        }

    def _described(self) -> dict[str, Any]:
        """What it takes to use the model, beside its weights."""
        return {
            "model": self.options.model,
            "settings": self.settings,
            "classes": self.train.classes,
            "size": self.options.size,
            "channels": self.train.channels,
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from :meth:`state`. Raises UsageError, one line, if the run it is of was another; nothing changes."""
        missing = [name for name in _RESUMED if name not in state]
        if missing:
            raise UsageError(f"{path} has a model, but no training to resume: it has no {', '.join(missing)}")
        checkpoint.demand(state, _RESUMED, path)
        run = {**self._described(), "ranks": self.ranks, "pictures": [len(self.train), len(self.test)]}
        for theirs, mine in ((state["options"], self.options.identity()), (state, run)):
            for name, value in mine.items():
                if not _same(theirs.get(name), value):
                    found = textwrap.shorten(str(theirs.get(name)), 200)  # one line, whatever it is
                    raise UsageError(f"{path} is of a run with {name} {found}, but here {name} is {value}")
        done = sum(len(self.sampler.draws(epoch)) for epoch in range(min(state["epoch"], self.options.epochs)))
        ended = state["epoch"] == self.options.epochs
        inside = 0 if ended else len(self.sampler.draws(state["epoch"]))
        if (
            state["epoch"] > self.options.epochs
            or state["in_epoch"] > inside
            or state["step"] != done + state["in_epoch"]
            or len(state["history"]) != state["epoch"]
        ):
            found = f"step {state['step']}, step {state['in_epoch']} of epoch {state['epoch'] + 1}"
            raise UsageError(f"{path} is at {found} with {len(state['history'])} rows, which does not match")
        # Rows are rounded.
        accuracies = [v for row in state["history"] for name, v in row.items() if name.endswith("accuracy")]
        if not abs(state["best"] - max(accuracies, default=-1.0)) <= 1e-6:
            raise UsageError(f"{path}: its best is {state['best']}, which none of its rows has as accuracy")
        seconds = math.fsum(row["seconds"] for row in state["history"])
        if not abs(state["seconds"] - seconds) <= 0.01 * len(state["history"]):
            raise UsageError(f"{path}: its seconds are {state['seconds']}, those of its rows are {seconds:.2f}")
        optimizer = self._optimizer_state(state["optimizer"]["state"], path)
        checkpoint.fit(self.model, state["state_dict"], path)
        if self.average is not None:
            checkpoint.fit(self.average.model, state["ema"], path)
        self.optimizer.load_state_dict(optimizer)
        self.epoch, self.in_epoch, self.step = state["epoch"], state["in_epoch"], state["step"]
        self.history, self.best, self.seconds = list(state["history"]), state["best"], state["seconds"]
        if self.rank == 0:  # it is the sum of all ranks
            self.total = state["total"].to(self.total)
        if self.progress is not None:
            self.progress.done = self.step

    def _optimizer_state(self, state: dict[Any, Any], path: Path) -> dict[str, Any]:
        """What the optimizer loads; its settings are those of the options. Raises UsageError where it does not fit."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for key, values in state.items():
            if not (
                isinstance(key, int)
                and 0 <= key < len(parameters)
                and isinstance(values, dict)
                and values.keys() == {"step", "exp_avg", "exp_avg_sq"}
                and all(isinstance(value, Tensor) for value in values.values())
                and values["step"].shape == ()
                and values["exp_avg"].shape == values["exp_avg_sq"].shape == parameters[key].shape
            ):
                raise UsageError(f"{path}: the optimizer's state of parameter {key!r} does not fit the model")
        return {**self.optimizer.state_dict(), "state": state}

    def _save(self) -> None:
        if self.options.output is None:
            return
        state = self.state()
        if self.rank == 0:
            checkpoint.save(state, self.options.output / "last.pt")

    # The loop

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the final figures and the row of each epoch."""
        with mvkernels.use_backend(self.options.backend):
            while self.epoch < self.options.epochs:
                begun, cpu = time.perf_counter(), time.process_time()
                self._train_epoch()
                loss = self._loss()
                measured = self.evaluate()
                seconds = time.perf_counter() - begun
                self.seconds += seconds
                self.epoch, self.in_epoch, self.total = self.epoch + 1, 0, self._counter()
                row = {
                    "epoch": self.epoch,
                    "loss": round(loss, 6),
                    **{name: round(value, 6) for name, value in measured.items()},
                    "seconds": round(seconds, 2),
                    "cpu_seconds": round(time.process_time() - cpu, 2),
                }
                self._finish(row, measured)
        return {
            "model": self.options.model,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epochs": self.epoch,
            "steps": self.step,
            "ranks": self.ranks,
            "pictures": len(self.train),
            "held_out": len(self.test),
            **{name: value for name, value in self.history[-1].items() if "seconds" not in name and name != "epoch"},
            "best_accuracy": round(self.best, 6),
            "seconds": round(self.seconds, 2),
            "history": self.history,
        }

    def _finish(self, row: dict[str, Any], measured: dict[str, float]) -> None:
        """Record an epoch. The best weights are written first: a run killed between the two files writes them again."""
        self.history.append(row)
        name = max(measured, key=lambda key: measured[key])
        if measured[name] > self.best:
            self.best = measured[name]
            if self.options.output is not None and self.rank == 0:
                model = self.average.model if name == "ema_accuracy" and self.average is not None else self.model
                result = {**self._described(), "state_dict": checkpoint.detached(model)}
                result |= {"accuracy": self.best, "epoch": self.epoch}
                checkpoint.save(result, self.options.output / "best.pt")
        self._save()
        if self.board is not None:
            for key in ("loss", *measured):
                self.board.add_scalar(f"epoch/{key}", row[key], self.step)
        if self.report is not None:
            self.report(row)

    def _train_epoch(self) -> None:
        self.train.epoch = self.epoch
        self.parallel.train()
        for pictures, labels in self._batches():
            rate = learning_rate(self.step, self.steps, self.warmup, self.options.lr, self.lr_min)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if self.progress is not None:
                last = f", accuracy {self.history[-1]['accuracy']:.3f}" if self.history else ""
                self.progress.step(f"{self.options.model}, epoch {self.epoch + 1} of {self.options.epochs}{last}")
            loss = self._step(pictures.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
            self.total += torch.stack((loss * len(labels), loss.new_tensor(len(labels)))).to(self.total.dtype)
            self.step, self.in_epoch = self.step + 1, self.in_epoch + 1
            if self.average is not None:
                self.average.update(self.model, self.step)
            if self.board is not None and self.step % 10 == 0:
                self.board.add_scalar("step/loss", float(loss), self.step)
                self.board.add_scalar("step/learning_rate", rate, self.step)
            if self.options.save_every and self.step % self.options.save_every == 0:
                self._loss()
                self._save()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(self.epoch, self.in_epoch)
        workers = self.options.workers
        yield from DataLoader(
            self.train, batch_sampler=self.sampler, num_workers=workers, pin_memory=self.device.type == "cuda"
        )

    def _step(self, pictures: Tensor, labels: Tensor) -> Tensor:
        # Seeds of neighbouring steps and ranks differ, whatever the seed of the run.
        torch.manual_seed(((self.options.seed * 1_000_003 + self.step) * 65_537 + self.rank) % 2**63)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
                logits = self.parallel(pictures)
        except ValueError as error:  # the model's own checks, and BatchNorm's
            shape = " x ".join(str(n) for n in pictures.shape)
            why = "BatchNorm has one value only" if "more than 1 value per channel" in str(error) else str(error)
            raise UsageError(f"{why}, of a batch of {shape}: want more pictures or larger ones") from None
        # EfficientFormer has a second classifier, for a teacher; without one both learn the labels.
        heads = logits if isinstance(logits, tuple) else (logits,)
        if not all(isinstance(head, Tensor) and head.dim() == 2 for head in heads):
            raise UsageError(f"{self.options.model} is not an image classifier")
        losses = [F.cross_entropy(h.float(), labels, label_smoothing=self.options.smoothing) for h in heads]
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.options.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        return loss.detach()

    def _loss(self) -> float:
        """Mean loss of this epoch so far. Raises UsageError where it is no number, before that is saved."""
        loss, count = self._sum(self.total).tolist()
        if not math.isfinite(loss):
            raise UsageError(f"the loss is {loss} at step {self.step}: try a lower --lr, or --clip")
        return loss / max(count, 1.0)

    def _sum(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.many:
            value = value.clone()
            dist.all_reduce(value)
        return value

    # Measuring

    def evaluate(self) -> dict[str, float]:
        """Accuracy of the model, and of its average, on all held-out pictures."""
        models = {"accuracy": self.model}
        if self.average is not None:
            models["ema_accuracy"] = self.average.model
        right = torch.zeros(len(models) + 1, device=self.device)
        for model in models.values():
            if self.many:  # statistics of BatchNorm are each rank's own until then
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            model.eval()
        mine = Subset(self.test, range(self.rank, len(self.test), self.ranks))
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
            for pictures, labels in DataLoader(mine, self.options.batch_size, num_workers=self.options.workers):
                x, wanted = pictures.to(self.device), labels.to(self.device)
                right[-1] += len(wanted)
                for i, model in enumerate(models.values()):
                    right[i] += (model(x).argmax(1) == wanted).sum()
        *counts, pictures_seen = self._sum(right).tolist()
        return {name: count / pictures_seen for name, count in zip(models, counts)}


def say(line: str) -> None:
    """A line on stderr, in place of the progress bar."""
    sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + line + "\n")
