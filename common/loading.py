"""Batches of a dataset, and the loop of an evaluation over them, which processes share."""
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from common import runtime
from common.datasets import PoseDataset, Prediction


class EvalImages(Dataset):
    """Item i is (network input, image id, (w, h) px, message); a file that cannot be read is black and has no id."""

    def __init__(self, data: PoseDataset, to_input: Callable[[Image.Image], Tensor]):
        self.data, self.to_input = data, to_input

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int | str | None, tuple[int, int], str]:
        sample, message = self.data.load(i)
        if sample is None:
            return self.to_input(Image.new("RGB", (32, 32))), None, (0, 0), message
        return self.to_input(sample.image), sample.image_id, sample.size, message


def collate(items: list[tuple], join: Callable = torch.stack) -> tuple:
    """Items of a batch column by column; `join` makes one of the first, by default stacks tensors of one shape."""
    images, *columns = zip(*items)
    return join(images), *map(list, columns)


def train_loader(items: Dataset | list, batches: list[list[int]], workers: int, ranks: runtime.Ranks,
                 join: Callable = torch.stack) -> DataLoader:
    """The given batches of a dataset, or of a list, which is in memory and needs no workers; `join` as in `collate`."""
    return DataLoader(items, batch_sampler=batches, num_workers=0 if isinstance(items, list) else workers,
                      collate_fn=partial(collate, join=join), worker_init_fn=runtime.ignore_signals,
                      pin_memory=ranks.device.type == "cuda")


def predict_all(predict: Callable[[dict], list[Prediction]], data: PoseDataset, to_input: Callable, batch: int,
                workers: int, ranks: runtime.Ranks, join: Callable = torch.stack) -> list[Prediction]:
    """Predictions of a dataset; the images are shared among the processes, all get the result.

    predict takes {images, image_ids, sizes_px}; join=list leaves images of different sizes apart. A file that cannot
    be read is named, and nobody is found in it.
    """
    mine = Subset(EvalImages(data, to_input), range(ranks.rank, len(data), ranks.world))
    loader = DataLoader(mine, batch, num_workers=workers, collate_fn=partial(collate, join=join),
                        worker_init_fn=runtime.ignore_signals)
    found = []
    for images, ids, sizes, messages in tqdm(loader, "evaluate", disable=ranks.rank > 0, leave=False, dynamic_ncols=True):
        predictions = predict(dict(images=images, image_ids=ids, sizes_px=sizes))
        found += [prediction for prediction in predictions if prediction.image_id is not None]
        for message in data.remember(messages):
            tqdm.write(f"warning: {message}")
    return runtime.gather_lists(found)
