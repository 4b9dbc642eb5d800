"""Heatmaps on the side: layout and values against loops over all cells."""
import math
from types import SimpleNamespace

import pytest
import torch


from common.heatmaps import SIGMA, CellHeatmaps, people_heatmap_loss, people_heatmaps


def some_people(people: int = 2, joints: int = 3) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(people)
    return SimpleNamespace(keypoints=torch.rand(people, joints, 2, generator=generator),
                           visible=torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])[:people])


def test_heatmaps_of_people_are_the_largest_gaussian_at_each_cell():
    one, (h, w) = some_people(), (5, 7)
    maps = people_heatmaps(one.keypoints, one.visible, (h, w))
    for j in range(3):
        for row in range(h):
            for column in range(w):
                want = 0.0
                for person in range(2):
                    if one.visible[person, j]:
                        dx = column + 0.5 - float(one.keypoints[person, j, 0]) * w
                        dy = row + 0.5 - float(one.keypoints[person, j, 1]) * h
                        want = max(want, math.exp(-(dx * dx + dy * dy) / (2 * SIGMA ** 2)))
                assert maps[j, row, column] == pytest.approx(want, abs=1e-6)


def test_a_cell_speaks_for_the_part_of_the_map_that_it_covers():
    head = CellHeatmaps(4, 3, across=2)
    assert (head(torch.randn(1, 6, 4), 2) == 0).all()
    with torch.no_grad():
        head.head.weight.normal_()
    cells = torch.randn(1, 6, 4)
    maps, changed = head(cells, 2), cells.clone()
    assert maps.shape == (1, 3, 4, 6)
    changed[0, 4] += 1                                              # row 1, column 1 of 2 x 3
    moved = (head(changed, 2) != maps).any(1)[0]
    assert moved[2:4, 2:4].all() and moved.sum() == 4


def test_the_loss_is_zero_at_the_truth_and_counts_labelled_keypoints():
    two, nobody = some_people(), some_people(0)
    true = torch.stack([people_heatmaps(t.keypoints, t.visible, (4, 6)) for t in (two, nobody)])
    assert people_heatmap_loss(true, [two, nobody]) == 0
    assert people_heatmap_loss(true + 0.5, [two, nobody]) == pytest.approx(0.25 * true.numel() / 3)
    assert people_heatmap_loss(true[1:] + 1, [nobody]) == true[1].numel()      # a batch without people: all should be 0


def test_the_loss_has_the_gradient_of_its_formula():
    maps = torch.rand(1, 3, 4, 4, requires_grad=True)
    people_heatmap_loss(maps, [some_people()]).backward()
    true = people_heatmaps(some_people().keypoints, some_people().visible, (4, 4))
    assert torch.allclose(maps.grad[0], 2 * (maps[0].detach() - true) / 3, atol=1e-6)
