"""Seeds, the order of images, and what processes share."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.ranks import Ranks, epoch_batches, gather_lists, init_ranks, mean_over_ranks, seed_all


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
