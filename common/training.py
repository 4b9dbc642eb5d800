"""What a training loop keeps account of, a call each, so that a method's `train` shows how the method learns."""
import argparse
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from common import metrics, runtime
from common.datasets import PoseDataset, Prediction
from common.loading import train_loader


class Loop:
    """Where a run stands, what its checkpoints hold, and its folder.

    cfg has epochs, accum, seed, workers, amp, clip and eval_every. Each process has a Loop of its own, and calls its
    methods in step with the others. Without `ema` the model itself is evaluated.
    Raises UserError when the checkpoint to resume does not fit or the folder cannot be written.
    """

    def __init__(self, method: str, cfg: Any, args: argparse.Namespace, ranks: runtime.Ranks, data: PoseDataset,
                 held_out: PoseDataset, model: nn.Module, optimizer: torch.optim.Optimizer,
                 ema: runtime.Ema | None = None):
        self.cfg, self.ranks, self.held_out, self.skeleton = cfg, ranks, held_out, data.skeleton.to_dict()
        self.model, self.optimizer, self.ema = model, optimizer, ema
        fp16 = cfg.amp == "fp16" and ranks.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
        self.at = dict(epoch=0, done=0, step=0, best=-math.inf)     # done: optimiser steps of this epoch
        average = {} if ema is None else dict(ema=ema)
        self.parts = dict(model=model) | average | dict(optimizer=optimizer, scaler=self.scaler)
        if args.saved:
            runtime.restore(self.parts, args.saved)
            self.at = {name: args.saved[name] for name in self.at}
        self.run = runtime.Run(method, cfg, args, ranks)
        args.saved = None                                           # its memory is ours again
        self.run.say(f"{data.report()}\n{held_out.report()}\nwriting to {self.run.folder}")

    @property
    def step(self) -> int:
        """Optimiser steps so far."""
        return self.at["step"]

    @property
    def last(self) -> bool:
        """Whether this is the last epoch."""
        return self.at["epoch"] + 1 == self.cfg.epochs

    def plan(self, count: int, micro: int) -> int:
        """Optimiser steps of the whole run, with `count` items per epoch and `micro` per forward pass and process."""
        self.micro = micro
        return self.cfg.epochs * len(self._epoch_batches(count)) // self.cfg.accum

    def _epoch_batches(self, count: int) -> list[list[int]]:
        return runtime.epoch_batches(count, self.micro, self.cfg.accum, self.cfg.seed, self.at["epoch"], self.ranks)

    def epochs(self) -> Iterator[int]:
        """The epochs to go. After the body of the `for` the epoch is done and last.pt is saved; a `return` from within
        the body leaves it as it is. Ctrl-C is from now on a question, see `stops`."""
        self.asked, epochs = runtime.Stopper(), self.cfg.epochs
        if self.at["epoch"] >= epochs:
            self.run.say(f"all {epochs} epochs are done; --epochs {2 * epochs} would go on")
        for epoch in range(self.at["epoch"], epochs):
            yield epoch
            self.run.bad_files(runtime.gather_lists([*self.run.bad, *self.held_out.bad]))
            self.at.update(epoch=epoch + 1, done=0)
            self.save_last(must=epoch + 1 == epochs)                # at the very end a full disk is an error

    def batches(self, items: Dataset | list, join: Callable = torch.stack) -> Iterator[tuple]:
        """This process's micro-batches that the epoch still has; `join` makes a batch of an item's first column.

        Before each the seed is set from (seed, epoch, its number, rank).
        """
        batches, first = self._epoch_batches(len(items)), self.at["done"] * self.cfg.accum
        loader = train_loader(items, batches[first:], self.cfg.workers, self.ranks, join)
        self.bar = tqdm(loader, f"epoch {self.at['epoch'] + 1}/{self.cfg.epochs}", len(batches), initial=first,
                        disable=self.ranks.rank > 0, dynamic_ncols=True)
        self.seen = []                                              # ids of the images of this optimiser step
        for self.number, batch in enumerate(self.bar, first):
            runtime.seed_all(self.cfg.seed, self.at["epoch"], self.number, self.ranks.rank)
            yield batch

    def set_lr(self, factor: float) -> None:
        """Every group of the optimiser learns at `factor` times its `initial_lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    @contextlib.contextmanager
    def naming(self, ids: list, skipped: list[list[str]]) -> Iterator[None]:
        """Say which files were skipped for a micro-batch. A FloatingPointError in the block becomes a UserError that
        names the images of this optimiser step."""
        self.run.bad_files(sum(skipped, []))
        self.seen += ids
        try:
            yield
        except FloatingPointError as error:
            raise self.run.not_finite(str(error), self.step, self.seen) from None

    def update(self) -> bool:
        """After the last micro-batch of an optimiser step: clip the gradient, take the step, and True.

        Raises UserError when the gradient is not finite.
        """
        if (self.number + 1) % self.cfg.accum:
            return False
        self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        if not (self.norm.isfinite() or self.scaler.is_enabled()):  # a scaler leaves such steps out by itself
            raise self.run.not_finite("the gradient", self.step, self.seen)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        self.at.update(step=self.step + 1, done=self.at["done"] + 1)
        self.seen = []
        return True

    def log(self, losses: dict[str, Tensor], names: Iterable[str]) -> None:
        """Every 20th step: the loss, those of its terms, the gradient's norm and the rate of the last group."""
        if self.step % 20:                                          # reading numbers makes a GPU wait
            return
        shown = dict(loss=sum(losses.values()).item()) | {name: losses[name].item() for name in names}
        self.run.log(step=self.step, epoch=self.at["epoch"], **shown, grad_norm=float(self.norm),
                     lr=self.optimizer.param_groups[-1]["lr"])
        self.bar.set_postfix({name.removeprefix("loss_"): f"{value:.3g}" for name, value in shown.items()})

    def stops(self) -> bool:
        """Whether somebody asked to stop; everything is saved then, as it is whenever the last time was long ago."""
        if self.asked(self.ranks):
            self.save_last(must=True)
            self.run.say(f"stopped and saved; go on with --resume {self.run.folder}")
            return True
        if self.run.save_is_due():
            self.save_last()
        return False

    def evaluates(self) -> bool:
        """Whether an evaluation follows: every `eval_every` epochs and after the last."""
        due = self.last or (self.at["epoch"] + 1) % self.cfg.eval_every == 0
        if due:
            self.save_last()                                        # a kill while evaluating costs nothing
            runtime.share_buffers(self.model if self.ema is None else self.ema)
        return due

    def record(self, table: dict[str, float], predictions: list[Prediction], about: str = "") -> None:
        """The metrics on the screen and in log.jsonl, best.pt if it is the best so far, the pictures."""
        score = table.get("Mean", table.get("AP"))                  # PoseTrack's, else OKS
        self.run.log(step=self.step, epoch=self.at["epoch"], **table)
        self.run.say(f"epoch {self.at['epoch'] + 1}{about}\n{metrics.format_table(table)}")
        if score > self.at["best"]:
            self.at["best"] = score
            best = self.model if self.ema is None else self.ema.module
            self.run.try_save("best.pt", **self.at, skeleton=self.skeleton, model=best.state_dict(), metrics=table)
        self.run.draw(self.held_out, predictions)

    def save_last(self, must: bool = False) -> None:
        """last.pt, to resume from. With `must` it raises UserError when the disk is full, else that is a warning."""
        save = self.run.save if must else self.run.try_save
        save("last.pt", **self.at, skeleton=self.skeleton, **runtime.states(self.parts))
