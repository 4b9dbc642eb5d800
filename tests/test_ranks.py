"""Seeds, the order of images, what processes share, and that many of them compute what one does.

    python -m tests.test_ranks METHOD DATA      how far 2 and 4 processes are from one: norms frozen, and as they learn
"""
import importlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common.cli import parse
from common.errors import UserError
from common.ranks import Ranks, epoch_batches, gather_lists, init_ranks, mean_over_ranks, seed_all, share_buffers
from common.records import People
from common.run import Run
from common.splits import open_dataset
from tests.torture import FLAGS


def test_seeds_are_a_function_of_the_numbers_alone():
    def draws(*where):
        seed_all(*where)
        return random.random(), np.random.rand(), torch.rand(()).item()
    assert draws(0, 3, 1) == draws(0, 3, 1)
    assert len({draws(*where) for where in ((0, 3, 1), (0, 31), (1, 3, 1), (0, 3), (3, 0, 1))}) == 5
    assert draws(0)[1] == pytest.approx(0.309532208)                          # the same on every machine and every day


def rank(i: int, world: int) -> Ranks:
    return Ranks(i, world, torch.device("cpu"))


@pytest.mark.parametrize("count, step", [(23, 4), (24, 8), (100, 12), (3, 8), (1, 4)])
def test_the_images_of_a_step_do_not_depend_on_the_number_of_processes(count, step):
    alone = epoch_batches(count, step, 1, 0, 5, rank(0, 1))
    assert alone != epoch_batches(count, step, 1, 0, 6, rank(0, 1)) or count == 1
    assert alone != epoch_batches(count, step, 1, 1, 5, rank(0, 1)) or count == 1
    for world, accum in ((2, 1), (4, 1), (1, 4), (2, 2)):
        each = [epoch_batches(count, step // world // accum, accum, 0, 5, rank(i, world)) for i in range(world)]
        assert all(len(batches) == len(alone) * accum for batches in each)
        for k, whole in enumerate(alone):
            parts = [part for batches in each for part in batches[k * accum:(k + 1) * accum]]
            assert sorted(sum(parts, [])) == sorted(whole)


def test_an_epoch_has_every_image_at_most_once_and_a_tiny_set_fills_a_step():
    batches = epoch_batches(23, 2, 2, 0, 0, rank(0, 1))
    assert len(batches) == 10 and len(set(sum(batches, []))) == 20          # 3 of 23 wait for the next epoch
    seen = {i for epoch in range(9) for batch in epoch_batches(23, 2, 2, 0, epoch, rank(0, 1)) for i in batch}
    assert seen == set(range(23))
    assert epoch_batches(1, 2, 2, 0, 0, rank(0, 1)) == [[0, 0], [0, 0]]
    small = epoch_batches(3, 4, 2, 0, 0, rank(0, 1))
    assert len(small) == 2 and sorted(np.bincount(sum(small, []))) == [2, 3, 3]


def test_one_process_is_its_own_mean_and_its_own_list():
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(mean_over_ranks(value), value) and gather_lists([1, "a"]) == [1, "a"]


def test_a_batch_that_does_not_split_is_one_line_before_anything_is_opened():
    with pytest.raises(UserError, match="--batch 6 does not split over 1 processes x 4 micro-batches"):
        init_ranks("cpu", SimpleNamespace(batch=6, accum=4, patience=120))


# ------------------------------------------------------------------------------------------ one, two and four processes


class Done(Exception):
    """Two steps were taken."""


def doubled(x):
    """The same in float64, within tuples, lists and people."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(doubled, x))
    if isinstance(x, People):
        return x.each(doubled)
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def two_steps(method: str, world: int, rank: int, folder: Path, frozen: bool) -> None:
    """One of so many processes: two steps of 8 images in float64, then two evaluations; rank 0 keeps what it saw.

    Noise is the same for all images, because each process draws its own; weights start away from zero. `frozen` norms
    are constants, else they are what the preset has.
    """
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                       POSE_MEETING=f"file://{folder}/meet{world}")
    module, seen = importlib.import_module(method), dict(losses=[], gradients=[])
    real = SimpleNamespace(batches=Run.batches, more=Run.more_micro_batches, distribute=module.distribute,
                           to_float=torch.Tensor.float)

    def start(model, ranks):
        seed_all(1)
        for p in model.parameters():
            p.data += 0.02 * torch.randn_like(p)
        seen["model"], seen["ranks"] = model, ranks
        return real.distribute(model, ranks)

    random_functions = {name: getattr(torch, name) for name in ("rand", "randn", "randn_like", "randperm", "randint")}

    def batches(self, *args):
        torch.rand = torch.randn = lambda *shape, device=None: torch.full(shape[0] if len(shape) == 1 else shape, 0.3)
        torch.randn_like, torch.randperm = lambda x: torch.full_like(x, 0.3), torch.arange
        torch.randint = lambda *args, device=None: torch.full(args[-1], args[-2] // 3)
        for columns in real.batches(self, *args):
            yield doubled(columns)

    def more(self, losses):
        seen["losses"].append({name: float(mean_over_ranks(torch.as_tensor(x).detach())) for name, x in losses.items()})
        return real.more(self, losses)

    def clip(parameters, limit):
        seen["gradients"].append({name: p.grad.clone() for name, p in seen["model"].named_parameters()
                                  if p.grad is not None})
        if len(seen["gradients"]) == 2:
            raise Done
        return nn.utils.clip_grad_norm_(parameters, limit)

    module.distribute, module.clip_grad_norm_ = start, clip
    Run.batches, Run.more_micro_batches, Run.show_batch = batches, more, lambda *args, **more: None
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    if frozen:
        nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)
    words = ["--train", *FLAGS[method].split(), "--batch", "8", "--device", "cpu", "--workers", "0", "--accum", "1",
             "--data", str(folder / "data"), "--out", str(folder / f"run{world}")]
    cfg, args = parse(module.Config, module.PRESETS, "", words)
    try:
        module.train(cfg, args)
    except Done:
        pass
    torch.set_default_dtype(torch.float32)
    torch.Tensor.float = real.to_float
    vars(torch).update(random_functions)
    model = seen.pop("model").float()
    share_buffers(model)                                        # as before every evaluation
    for name in ("val", "few"):                                 # 7 images; 3, of which one has people
        data = open_dataset(str(folder / ("data" if name == "val" else name)), "val")
        table, found = module.evaluate(model, data, cfg, seen["ranks"])
        seen[name] = dict(table=table, found={str(one.image_id): float(np.sum(one.keypoints)) for one in found})
    seen.pop("ranks")
    if rank == 0:
        torch.save(seen, folder / f"seen{world}.pt")


def annotations(folder: Path, change) -> None:
    file = folder / "annotations/person_keypoints_val2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def compare(method: str, puppets: Path, folder: Path, frozen: bool) -> list[tuple[dict, float, float]]:
    """For 2 and 4 processes: what they saw, and the largest difference from one, of losses and of gradients, relative
    to the largest of them. Processes are forked from one that has imported everything."""
    shutil.copytree(puppets, folder / "data")
    annotations(folder / "data", lambda content: content["images"].pop())
    shutil.copytree(folder / "data", folder / "few")

    def keep_few(content):
        content["images"] = content["images"][:3]
        with_people = content["annotations"][0]["image_id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == with_people]
    annotations(folder / "few", keep_few)
    importlib.import_module(method)
    fork, seen = multiprocessing.get_context("fork"), {}
    for world in (1, 2, 4):
        group = [fork.Process(target=two_steps, args=(method, world, rank, folder, frozen)) for rank in range(world)]
        [process.start() for process in group]
        [process.join() for process in group]
        assert not any(process.exitcode for process in group)
        seen[world] = torch.load(folder / f"seen{world}.pt", weights_only=True)
    result = []
    for world in (2, 4):
        parts = {}
        for kind in ("losses", "gradients"):
            ours, theirs = ([torch.as_tensor(x, dtype=torch.float64) for step in seen[n][kind] for x in step.values()]
                            for n in (world, 1))
            assert len(ours) == len(theirs)
            largest = max(float(x.abs().max()) for x in theirs)
            parts[kind] = max(float((a - b).abs().max()) for a, b in zip(ours, theirs)) / largest
        result.append((seen[world], parts["losses"], parts["gradients"]))
    for world in (2, 4) if frozen else ():                      # else other weights are evaluated
        for name in ("val", "few"):
            ours, theirs = seen[world][name], seen[1][name]
            assert ours["table"] == pytest.approx(theirs["table"], abs=1e-6, nan_ok=True), (world, name)
            assert ours["found"] == pytest.approx(theirs["found"], rel=1e-4), (world, name)
            assert len(seen[1][name]["found"]) == dict(val=7, few=3)[name]
    return result


def measure(method: str, puppets: str) -> None:
    for frozen in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            for world, (_, losses, gradients) in zip((2, 4), compare(method, Path(puppets), Path(folder), frozen)):
                row = dict(method=method, frozen=frozen, processes=world, losses=losses, gradients=gradients)
                print(json.dumps(row), flush=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("method", FLAGS)
def test_two_and_four_processes_have_the_losses_gradients_and_tables_of_one(method, puppets_folder):
    done = subprocess.run([sys.executable, "-m", "tests.test_ranks", method, str(puppets_folder)], text=True,
                          capture_output=True, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["processes"] for row in rows] == [2, 4, 2, 4]
    assert all(max(row["losses"], row["gradients"]) < 1e-6 for row in rows if row["frozen"])
    assert all(row["losses"] < 0.3 for row in rows)             # norms of each process's images alone: close, not equal


if __name__ == "__main__":
    measure(*sys.argv[1:])
