"""Batches of a dataset, and the one loop of an evaluation over whole pictures or over crops of people."""
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from common.boxes import Boxes
from common.datasets import PoseDataset, id_key
from common.ranks import Ranks, gather_lists, start_loader
from common.records import Prediction, Sample


def collate(items: list[tuple], join: Callable = torch.stack) -> tuple:
    """Items of a batch column by column; `join` makes one of the first, by default stacks tensors of one shape."""
    inputs, *columns = zip(*items)
    return join(inputs), *map(list, columns)


def train_loader(items: Dataset | list, batches: list[list[int]], workers: int, ranks: Ranks,
                 join: Callable = torch.stack) -> DataLoader:
    """The given batches of a dataset, or of a list, which is in memory and needs no workers; `join` as in `collate`."""
    return DataLoader(items, batch_sampler=batches, num_workers=0 if isinstance(items, list) else workers,
                      collate_fn=partial(collate, join=join), worker_init_fn=start_loader,
                      pin_memory=ranks.device.type == "cuda")


def over_items(answer: Callable, items: Dataset, data: PoseDataset, batch: int, workers: int, ranks: Ranks,
               join: Callable = torch.stack) -> list:
    """What `answer` finds in each item, in order; the items are shared among the processes, all get the result.

    An item is (input, *what else is known of it, its number, message). answer(inputs, *columns) gives a result per
    item. Without a number an item could not be read: its message is printed, and its result is left out.
    """
    mine = Subset(items, range(ranks.rank, len(items), ranks.world))
    loader = DataLoader(mine, batch, num_workers=workers, collate_fn=partial(collate, join=join),
                        worker_init_fn=start_loader)
    found = []
    for *columns, places, messages in tqdm(loader, "evaluate", disable=ranks.rank > 0, leave=False, dynamic_ncols=True):
        found += [pair for pair in zip(places, answer(*columns)) if pair[0] is not None]
        for message in data.remember(messages):
            tqdm.write(f"warning: {message}")
    return [result for _, result in sorted(gather_lists(found), key=lambda pair: pair[0])]


@contextlib.contextmanager
def watch(**parts: Iterable[nn.Module]) -> Iterator[dict[str, list]]:
    """A look into a model: by name, what the modules of that name give from now on, call by call."""
    seen, hooks = {name: [] for name in parts}, []
    for name, modules in parts.items():
        hooks += [module.register_forward_hook(lambda module, given, out, name=name: seen[name].append(out))
                  for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- whole pictures

class Pictures(Dataset):
    """Item i is (network input, image id, (w, h) px, i, message); a file that cannot be read is black, without i."""

    def __init__(self, data: PoseDataset, to_input: Callable[[Image.Image], Tensor]):
        self.data, self.to_input = data, to_input

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int | str, tuple[int, int], int | None, str]:
        sample, message = self.data.load(i)
        if sample is None:
            return self.to_input(Image.new("RGB", (32, 32))), "", (0, 0), None, message
        return self.to_input(sample.image), sample.image_id, sample.size, i, message


def predict_all(predict: Callable[[dict], list[Prediction]], data: PoseDataset, to_input: Callable, batch: int,
                workers: int, ranks: Ranks, join: Callable = torch.stack) -> list[Prediction]:
    """Predictions of a dataset, as `over_items`; predict takes {images, image_ids, sizes_px}.

    join=list leaves images of different sizes apart.
    """
    def answer(images, ids: list, sizes: list) -> list[Prediction]:
        return predict(dict(images=images, image_ids=ids, sizes_px=sizes))

    return over_items(answer, Pictures(data, to_input), data, batch, workers, ranks, join)


# ---------------------------------------------------------------- crops of people

class PersonCrops(Dataset):
    """Item n is (crop, image id, box (4,), score, n, message); of a file that cannot be read black, without n."""

    def __init__(self, data: PoseDataset, boxes: Boxes, to_crop: Callable[[Sample, np.ndarray], Tensor]):
        found = [boxes.of(data[i].image_id) for i in range(len(data))]
        self.data, self.to_crop = data, to_crop
        self.image = np.repeat(np.arange(len(data)), [len(scores) for _, scores in found])
        self.boxes, self.scores = (np.concatenate(column) for column in zip(*found))

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, n: int) -> tuple[Tensor, int | str, np.ndarray, float, int | None, str]:
        i, box = int(self.image[n]), self.boxes[n]
        sample, message = self.data.load(i)
        place = None if sample is None else n
        if sample is None:
            black = Image.new("RGB", self.data[i].size)
            sample = replace(self.data[i], image=black, frames=(black,) * len(self.data[i].frames))
        return self.to_crop(sample, box), sample.image_id, box, float(self.scores[n]), place, message


def people_by_image(rows: Iterable[tuple], image_ids: Iterable[int | str], keypoints: int) -> list[Prediction]:
    """Rows (image id, keypoints (K, 2), their scores (K,), score, box (4,)) → a Prediction per image id, in order."""
    people: dict[str, list] = {}
    for image_id, *person in rows:
        people.setdefault(id_key(image_id), []).append(person)
    nobody = [np.zeros((0, *shape)) for shape in ((keypoints, 2), (keypoints,), (), (4,))]
    return [Prediction(image_id, *map(np.stack, zip(*people[id_key(image_id)])) if id_key(image_id) in people else nobody)
            for image_id in image_ids]


def predict_people(poses: Callable[[Tensor, np.ndarray], tuple], data: PoseDataset, boxes: Boxes, to_crop: Callable,
                   batch: int, workers: int, ranks: Ranks) -> list[Prediction]:
    """All people of a dataset, `batch` crops at a time: a Prediction for each image, its scores those of the boxes.

    to_crop (sample, box (4,)) → crop; poses (crops (N, ...), boxes (N, 4)) → keypoints (N, K, 2) in image pixels and
    their scores (N, K). As `over_items`.
    """
    def answer(crops: Tensor, ids: list, people: list[np.ndarray], scores: list[float]) -> list[tuple]:
        return list(zip(ids, *poses(crops, np.stack(people)), scores, people))

    rows = over_items(answer, PersonCrops(data, boxes, to_crop), data, batch, workers, ranks)
    return people_by_image(rows, [data[i].image_id for i in range(len(data))], data.skeleton.num_keypoints)
