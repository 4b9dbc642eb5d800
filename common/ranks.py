"""Processes and devices: who this process is among those of a torchrun, what they share, seeds, the order of images.

Every random number is a function of the seed and of where it is used (`seed_all(seed, epoch, batch, rank)` before a
step, `np.random.default_rng([seed, epoch, image])` for an augmentation, `epoch_batches(seed, epoch)` for the order),
so a run that goes on after a kill needs no saved random state.
"""
import contextlib
import hashlib
import multiprocessing
import os
import random
import re
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError

AMP = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Ranks(NamedTuple):
    """Who this process is among those of a `torchrun`; (0, 1, device) when it runs alone."""
    rank: int
    world: int
    device: torch.device


def pick_device(name: str) -> torch.device:
    """auto → the first GPU if there is one. Raises UserError when a GPU is asked for but absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:<number>")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no GPU that torch {torch.__version__} can use; take --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


def init_ranks(device: str, config: Any = None) -> Ranks:
    """Join the processes of a `torchrun` on one or many machines: NCCL on GPUs, gloo on CPUs.

    config: of a training; UserError if its batch does not split over them.
    """
    ranks = join_ranks(device, 600 if config is None else config.patience)
    if config is not None:
        micro_batch(config, ranks)
    return ranks


def join_ranks(device: str, patience: int) -> Ranks:
    if "LOCAL_RANK" not in os.environ:                          # RANK alone is set by some clusters, too
        return Ranks(0, 1, pick_device(device))
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = pick_device(f"cuda:{local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", os.environ.get("POSE_MEETING", "env://"),
                                timeout=timedelta(seconds=patience), rank=rank, world_size=world)
        PATIENT.append(dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    return Ranks(rank, world, chosen)


PATIENT: list = []          # the group in which processes wait for long honest work of rank 0


def wait_for_all() -> None:
    """Until every process is here, however long rank 0 fetches, draws or writes; a process that died ends the others."""
    if PATIENT:
        dist.barrier(PATIENT[0])


@contextlib.contextmanager
def rank_zero_first(ranks: Ranks) -> Iterator[None]:
    """Rank 0 goes through the block alone (it makes or fetches files), then the others find them there."""
    if ranks.rank > 0:
        wait_for_all()
    yield
    if ranks.rank == 0:
        wait_for_all()


def distribute(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model to call in training: gradients are averaged, and on GPUs norms computed, over all processes."""
    if ranks.world == 1:
        return model
    if ranks.device.type == "cpu":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)     # a copy of them less a step
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, [ranks.device])


def share_buffers(module: nn.Module) -> None:
    """Rank 0's buffers everywhere: on CPUs each process has norm statistics of its own, and rank 0's are saved."""
    for buffer in module.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


def autocast(device: torch.device, amp: str, keep_casts: bool = True) -> torch.autocast:
    """Mixed precision on a GPU (amp: no, bf16 or fp16); a CPU always computes in float32.

    keep_casts: whether the half-precision copies of weights stay in memory up to the end, to be used again.
    """
    return torch.autocast(device.type, AMP[amp], enabled=amp != "no" and device.type == "cuda",
                          cache_enabled=keep_casts)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, so that N GPUs give the gradient that one would."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def say(text: str) -> None:
    """Print on rank 0 alone, above a progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)


def gather_lists(part: list) -> list:
    """The parts of all processes behind one another, rank by rank, on every process."""
    if not dist.is_initialized():
        return part
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [item for one in parts for item in one]


def micro_batch(config: Any, ranks: Ranks) -> int:
    """Images per process and forward pass, of `batch` per optimiser step. Raises UserError if they do not come out even."""
    shares = config.accum * ranks.world
    if config.batch % shares:
        raise UserError(f"--batch {config.batch} does not split over {ranks.world} processes x {config.accum} "
                        "micro-batches: choose a multiple")
    return config.batch // shares


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def start_loader(worker: int) -> None:
    """For loader processes: Ctrl-C and SIGTERM reach them too, but it is the loop that has to end in order. Where the
    training was killed, a thread of multiprocessing would print a traceback about its broken connection; and PyTorch
    watches whether the parent changes from now on, so a parent that is dead by now would be waited for without end."""
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda kind, *rest: issubclass(kind, ConnectionError) or sys.__excepthook__(kind, *rest)


def seed_all(*where: int) -> None:
    """Seed python, numpy and torch from any numbers, e.g. (seed, step, rank)."""
    seed = int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch_batches(count: int, micro: int, accum: int, seed: int, epoch: int, ranks: Ranks,
                  start: int = 0) -> list[list[int]]:
    """This process's micro-batches of an epoch over `count` images, in a new order each epoch, without its first `start`.

    The order is one for all processes; an optimiser step takes its next micro·world·accum images, and each process
    every world-th of them, so N processes see together what one would see. The rest that fills no step waits for
    the next epoch; a set smaller than one step is repeated until it fills one.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    step = micro * ranks.world * accum
    order = np.resize(order, max(step, count // step * step))[start:]
    order = order[:len(order) // step * step]
    return [part[ranks.rank::ranks.world].tolist() for part in order.reshape(-1, micro * ranks.world)]
