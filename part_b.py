import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import draw, metrics, runtime, transforms
from common.datasets import PoseDataset, Prediction, Sample, default_splits, open_dataset
from common.loading import collate, predict_all
from common.skeletons import Skeleton
from querypose import PRESETS, Config, Output, QueryPose, build, convert_official, fuse, load_init, place_keypoints  # noqa

# ---- Matching and losses (Sec. 3.4). A set of pairs is (image, query, person): three index tensors of one ----
# length; `person` counts through all people of the batch in image order.

Pairs = tuple[Tensor, Tensor, Tensor]
WEIGHTS = dict(ce=2.0, bbox=5.0, giou=2.0, kps=1.0)
TENSORS = ("keypoints", "visible", "boxes", "sizes")
SMALLEST_SIGMA = 1e-6      # of the box; a sigmoid reaches 0


@dataclass
class Targets:
    """The people of one image, in pixels of the network's input. P people, possibly none."""
    keypoints: Tensor      # (P, K, 2) xy; 0 where not labelled
    visible: Tensor        # (P, K) 1 = labelled
    boxes: Tensor          # (P, 4) x1, y1, x2, y2
    sizes: Tensor          # (P, 2) w, h of the image that each is in
    image_id: int | str = 0

    def to(self, device: torch.device) -> "Targets":
        moved = (getattr(self, name).to(device, non_blocking=True) for name in TENSORS)
        return Targets(*moved, self.image_id)

    def take(self, index: Tensor) -> "Targets":
        """Some of the people, in this order, also repeatedly."""
        return Targets(*(getattr(self, name)[index] for name in TENSORS))

    def __len__(self) -> int:
        return len(self.boxes)


def gather_people(targets: list[Targets]) -> Targets:
    """All people of the batch behind one another."""
    return Targets(*(torch.cat([getattr(t, name) for t in targets]) for name in TENSORS))


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU = ∩ / ∪ − (hull − ∪) / hull of boxes xyxy (..., 4); leading dimensions broadcast. In [−1, 1]."""
    common = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    inter, hull = common.prod(-1), around.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def box_distance(boxes: Tensor, people: Targets) -> Tensor:
    """‖b − b*‖₁ over the four sides, as fractions of the image's w and h; boxes (..., P, 4) → (..., P)."""
    return ((boxes - people.boxes).abs() / people.sizes.repeat(1, 2)).sum(-1)


def match_cost(logits: Tensor, boxes: Tensor, people: Targets) -> Tensor:
    """Cost of giving a query to a person, (B, Q, P): 2·class + 5·L1 − 2·GIoU. The pose has no say."""
    p, boxes = logits.float().sigmoid().unsqueeze(-1), boxes.float().unsqueeze(-2)
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    return 2 * focal + 5 * box_distance(boxes, people) - 2 * generalized_iou(boxes, people.boxes)


@torch.no_grad()
def match(stages: list[tuple[Tensor, Tensor]], targets: list[Targets]) -> list[Pairs]:
    """The cheapest one-to-one assignment of people to queries, for each stage on its own (Hungarian method).

    stages: logits (B, Q) and boxes (B, Q, 4) of each. Raises FloatingPointError when a cost is not finite.
    """
    people = gather_people(targets)
    costs = torch.stack([match_cost(*stage, people) for stage in stages]).cpu()       # one wait for the GPU
    if not costs.isfinite().all():
        raise FloatingPointError("the matching cost")
    ends = np.cumsum([0] + [len(t) for t in targets])
    matchings = []
    for cost in costs.numpy():
        found = []
        for image, (first, last) in enumerate(zip(ends, ends[1:])):
            query, person = linear_sum_assignment(cost[image, :, first:last])
            found.append(np.stack([np.full_like(query, image), query, person + first]))
        matchings.append(tuple(torch.from_numpy(np.concatenate(found, 1)).to(people.boxes.device)))
    return matchings


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """−α (1 − p)² log p where positive, −(1 − α) p² log(1 − p) elsewhere, α = 0.25, summed."""
    p = logits.sigmoid()
    weight = torch.where(positive > 0, 0.25 * (1 - p) ** 2, 0.75 * p ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, positive, reduction="none")).sum()


def pose_in_box(boxes: Tensor, people: Targets) -> tuple[Tensor, Tensor]:
    """Where the people's keypoints are in boxes (P, 4), one for each: (P, K, 2) in sizes of the box, seen from its
    centre, and (P, K), 1 for what is labelled and inside. A box without width has it at 1/1000 pixel."""
    corner, size = boxes[:, None, :2], (boxes[:, None, 2:] - boxes[:, None, :2]).clamp(min=1e-3)
    place = (people.keypoints - corner) / size
    return place - 0.5, people.visible * ((place >= 0) & (place <= 1)).all(-1)


def likelihood_loss(mu: Tensor, sigma: Tensor, true: Tensor, visible: Tensor, log_prob: Callable) -> Tensor:
    """Residual log-likelihood (eq. 4): −log P(true | ROI) of each coordinate, (P, K, 2), 0 where not visible.

        x̄ = (μ − x*) / σ,    −log P = [log σ − log φ(x̄)] + [log(σ √(2π)) + |x* − μ| / (√2 σ)]

    with φ the flow's density of x̄ and, in the second bracket, the simple density that it corrects. Keypoints are
    (P, K, 2), visible (P, K), log_prob maps (..., 2) → (...).
    Departs  φ is one density of x and y together, and counts once for each; σ counts in both brackets
    """
    sigma = sigma.clamp(min=SMALLEST_SIGMA)
    # what is not visible sits at μ: 0 times a number that is not finite would not be 0
    true = torch.where(visible[..., None] > 0, true, mu.detach())
    flow = sigma.log() - log_prob((mu - true) / sigma)[..., None]
    simple = (sigma * math.sqrt(2 * math.pi)).log() + (true - mu).abs() / (math.sqrt(2) * sigma + 1e-9)
    return visible[..., None] * (flow + simple)


def stage_losses(output: Output, pairs: Pairs, people: Targets, log_prob: Callable) -> dict[str, Tensor]:
    """The loss terms of one stage for the pairs that were matched, summed over the batch."""
    logits, boxes, mu, sigma = (x.float() for x in output)
    image, query, person = pairs
    positive, true = torch.zeros_like(logits), people.take(person)
    positive[image, query] = 1
    boxes = boxes[image, query]
    place, inside = pose_in_box(boxes.detach(), true)
    likelihood = likelihood_loss(mu[image, query], sigma[image, query], place, inside, log_prob)
    return dict(ce=focal_loss(logits, positive), bbox=box_distance(boxes, true).sum(),
                giou=(1 - generalized_iou(boxes, true.boxes)).sum(), kps=likelihood.sum() / mu.shape[-2])


def criterion(stages: list[Output], matchings: list[Pairs], targets: list[Targets],
              log_prob: Callable) -> dict[str, Tensor]:
    """All weighted loss terms by their names in the release, for the pairs of each stage; their sum is minimised.

    For every stage (_0, _1, ..., the last without suffix), per person: 2·focal + 5·L1 + 2·(1 − GIoU), which is L_QI,
    and the mean over the K keypoints, visible or not, of eq. 4, which is L_QP. Computed in float32. L_QP may be
    negative. No people give 0 with a zero gradient, but for the focal loss.
    """
    people = gather_people(targets)
    count = runtime.mean_over_ranks(torch.tensor(float(len(people)), device=people.boxes.device)).clamp(min=1)
    losses = {}
    for s, (output, pairs) in enumerate(zip(stages, matchings), 1):
        name = "" if s == len(stages) else f"_{s - 1}"
        for term, value in stage_losses(output, pairs, people, log_prob).items():
            losses[f"loss_{term}{name}"] = WEIGHTS[term] * value / count
    return losses


# ---- Prediction ---------------------------------------------------------------------------------------------

STRIDE = 32                # of the coarsest map: images are padded to multiples of it


def pad_images(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (3, h, w) → zero-padded (B, 3, H, W) at the right and bottom, and the sizes w, h (B, 2) before."""
    sizes = torch.tensor([[p.shape[2], p.shape[1]] for p in pictures])
    width, height = ((sizes.amax(0) + STRIDE - 1) // STRIDE * STRIDE).tolist()
    images = torch.zeros(len(pictures), 3, height, width)
    for picture, image in zip(pictures, images):
        image[:, :picture.shape[1], :picture.shape[2]] = picture
    return images, sizes


def detect(model: QueryPose, pictures: list[Tensor]) -> Output:
    """What the last stage says of normalised pictures; on the CPU, in float32."""
    device = next(model.parameters()).device
    images, sizes = pad_images(pictures)
    with runtime.autocast(device, model.cfg.amp):
        output = model(images.to(device), sizes.to(device))["stages"][-1]
    return Output(*(x.float().cpu() for x in output))


def pose_scores(output: Output) -> tuple[Tensor, Tensor]:
    """Score of each person, C Σ_k (1 − σ_k) / K with C = sigmoid(logit), and 1 − σ_k of each keypoint, where σ_k is
    the mean of its deviations in x and y (Sec. 3.4): (..., Q), (..., Q, K)."""
    certain = 1 - output.sigmas.mean(-1)
    return output.logits.sigmoid() * certain.mean(-1), certain


def to_prediction(output: Output, image_id: int | str, input_px: tuple, size_px: tuple) -> Prediction:
    """The queries of one image, without the dimension B, as people in its pixels; sizes are (w, h).

    There is no NMS. Queries without a pose go, and those with nothing of their box in the image. Half a pixel less:
    the targets had it more (`people_to_learn`).
    """
    scale = np.divide(size_px, input_px)
    places = place_keypoints(output.keypoints, output.boxes).numpy() * scale - 0.5
    boxes = (output.boxes.numpy() * np.tile(scale, 2)).clip(0, np.tile(size_px, 2))
    scores, certain = (x.numpy() for x in pose_scores(output))
    seen = (boxes[:, 2:] > boxes[:, :2]).all(1) & (scores > 0)
    return Prediction(image_id, places[seen], certain[seen], scores[seen], boxes[seen])


@torch.no_grad()
def predict(model: QueryPose, batch: dict) -> list[Prediction]:
    """People of a batch {images: list of (3, h, w) from `input_image`, image_ids, sizes_px}: one Prediction per image.

    Every query with a pose is somebody, most with a score near 0.
    """
    people, output = [], detect(model, batch["images"])
    for i, picture in enumerate(batch["images"]):
        one = Output(*(x[i] for x in output))
        people.append(to_prediction(one, batch["image_ids"][i], picture.shape[:0:-1], batch["sizes_px"][i]))
    return people


# ---- Data: aspect ratio kept, short side 480 to 800, random crops, ImageNet normalisation --------------------

MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None] / 255
STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None] / 255


def normalise(image: Image.Image) -> Tensor:
    """An RGB picture as (3, h, w), each channel less ImageNet's mean and divided by its deviation."""
    return (transforms.to_tensor(image) - MEAN) / STD


def input_size(size: tuple[int, int], short_side: int, longest: float = math.inf) -> tuple[int, int]:
    """(w, h) with the shorter side `short_side`, or less where the longer one would exceed `longest`."""
    scale = short_side / min(size)
    w, h = (side * scale for side in size)
    scale = min(1.0, longest / max(w, h))
    return max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))


def input_image(image: Image.Image, cfg: Config) -> Tensor:
    """A picture of any size as the network sees it: see `short_side` and `long_side`."""
    return normalise(image.resize(input_size(image.size, cfg.short_side, cfg.long_side), Image.Resampling.BILINEAR))


def people_to_learn(sample: Sample) -> Sample:
    """Without crowd regions and boxes outside of the image; people without keypoints stay. Keypoints get half a pixel
    more: from now on the first column's centre is 0.5."""
    boxes = sample.boxes.clip(0, np.tile(np.float32(sample.size), 2))
    keep = ~sample.iscrowd & (boxes[:, 2:] > boxes[:, :2]).all(1)
    shifted = sample.keypoints + np.float32([0.5, 0.5, 0])
    return replace(sample, keypoints=shifted[keep], boxes=boxes[keep], areas=sample.areas[keep],
                   iscrowd=sample.iscrowd[keep])


def hide_outside(people: Sample, x: int, y: int, w: int, h: int) -> Sample:
    """Keypoints outside of a window of the image are no longer labelled."""
    inside = ((people.keypoints[..., :2] >= (x, y)) & (people.keypoints[..., :2] <= (x + w, y + h))).all(-1)
    return replace(people, keypoints=people.keypoints * inside[..., None])


def augment(people: Sample, cfg: Config, rng: np.random.Generator) -> Sample:
    """Crop half of the images, resize. For `short_side` 800 with the lengths of the release: short sides 480, 512, ...,
    800; before a crop 400, 500 or 600; sides of crops 384 to 600."""
    full = cfg.short_side
    if not cfg.multiscale:
        return transforms.resize(people, input_size(people.size, full, cfg.long_side))
    if rng.random() < 0.5:
        before = int(rng.choice([full // 2, full * 5 // 8, full * 3 // 4]))
        people = transforms.resize(people, input_size(people.size, before))
        window = [int(rng.integers(full * 12 // 25, min(side, full * 3 // 4) + 1)) for side in people.size]
        corner = [int(rng.integers(0, side - length + 1)) for side, length in zip(people.size, window)]
        people = transforms.crop(hide_outside(people, *corner, *window), *corner, *window)
    short_side = int(rng.choice(range(full * 3 // 5, full + 1, 32)))
    return transforms.resize(people, input_size(people.size, short_side, cfg.long_side))


def to_targets(people: Sample) -> Targets:
    """A sample's people as tensors; keypoints without label, or outside of the image, at 0."""
    people = hide_outside(people, 0, 0, *people.size)
    labelled = torch.from_numpy(people.keypoints[..., 2:] > 0).float()
    return Targets(keypoints=torch.from_numpy(people.keypoints[..., :2]) * labelled, visible=labelled.squeeze(-1),
                   boxes=torch.from_numpy(people.boxes), sizes=torch.tensor(people.size).float().expand(len(labelled), 2),
                   image_id=people.image_id)


class TrainImages(torch.utils.data.Dataset):
    """One epoch of augmented training images; item i is (tensor (3, h, w), Targets, why files were skipped).

    What happens to image i depends on (seed, epoch, i) alone. A file that cannot be read gives way to the next.
    """

    def __init__(self, data: PoseDataset, cfg: Config, epoch: int):
        self.data, self.cfg, self.epoch = data, cfg, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Targets, list[str]]:
        rng = np.random.default_rng([self.cfg.seed, self.epoch, i])
        people, skipped = self.data.load_readable(i)
        if self.data.skeleton.flip is not None and rng.random() < 0.5:
            people = transforms.hflip(people, self.data.skeleton.flip)
        people = augment(people_to_learn(people), self.cfg, rng)
        return normalise(people.image), to_targets(people), skipped


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config) -> dict:
    """RGB pictures of any size → what `predict` takes."""
    return dict(images=[input_image(picture, cfg) for picture in pictures], image_ids=image_ids,
                sizes_px=[picture.size for picture in pictures])


def evaluate(model: QueryPose, data: PoseDataset, cfg: Config, ranks: runtime.Ranks) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset; the images are shared among the processes, all get the result.

    Departs  the release passes results through a soft-NMS that takes the boxes' lower sides for scores. Many end with a
             negative height, and COCO's evaluation then ignores those poses instead of counting them as wrong; most
             published APs are made that way, and some 2.5 above the plain ones, which are computed here
    """
    found = predict_all(partial(predict, fuse(model)), data, partial(input_image, cfg=cfg), cfg.eval_batch,
                        cfg.workers, ranks, join=list)
    return metrics.evaluate(found, data), found


def open_crowd(skeleton: Skeleton, ranks: runtime.Ranks) -> PoseDataset:
    """The puppets' crowd split with CrowdPose's index of crowding, which only its file of 14 keypoints has."""
    with runtime.rank_zero_first(ranks):                         # it draws them
        crowd, index = (open_dataset("puppets", "crowd", kind) for kind in (skeleton, "crowdpose"))
    crowd.crowd_index, crowd.metric = index.crowd_index, "crowdpose"
    return crowd


# ---- Pictures: where the parts of a person look (Fig. 5 and 6), and how sure its joints are --------------------


def draw_attention(crop: Image.Image, attention: np.ndarray) -> list[Image.Image]:
    """The inside of a box, and once more under each part's map (M, n, n): the brightest cell is the largest."""
    side = (192, 192)
    crop = crop.resize(side, Image.Resampling.BILINEAR)
    shades = (255 * attention / attention.max((1, 2), keepdims=True)).astype(np.uint8)
    heat, shown = Image.new("RGB", side, draw.RIGHT[0]), [crop]
    for shade in shades:
        mask = Image.fromarray(shade).resize(side, Image.Resampling.BILINEAR)
        shown.append(Image.composite(heat, crop.point(lambda value: value // 2), mask))
    return shown


@torch.no_grad()
def show_process(model: QueryPose, image: Image.Image, threshold: float) -> dict[str, list[Image.Image]]:
    """For eval.py --process, of people above the threshold: `sigma`, the image with an ellipse of two deviations σ at
    each keypoint, and with SPEGM `attention`, the last stage's maps A, a row per person: her box, then a map per part.
    """
    maps, skeleton, size, picture = [], model.skeleton, image.size, input_image(image, model.cfg)
    shows = model.cfg.interaction == "spegm"
    if shows:
        hook = model.keypoint_stages[-1].look.attention.register_forward_hook(lambda *call: maps.append(call[-1]))
    output = Output(*(x[0] for x in detect(model, [picture])))
    scale = torch.tensor(size) / torch.tensor(picture.shape[:0:-1])
    boxes = output.boxes * scale.repeat(2)
    rows = (pose_scores(output)[0] >= max(threshold, 1e-6)).nonzero().squeeze(1)
    people, spread = place_keypoints(output.keypoints, boxes)[rows] - 0.5, output.sigmas[rows]
    spread = spread * (boxes[rows, 2:] - boxes[rows, :2])[:, None]
    # four guesses of each joint whose standard deviations are σ
    guesses = torch.stack([people + sign * 2 ** 0.5 * spread * torch.tensor(axis) for sign in (-1, 1)
                           for axis in ([1.0, 0.0], [0.0, 1.0])])
    shown = dict(sigma=[draw.draw_ellipses(image, guesses.numpy(), skeleton)])
    if shows:
        hook.remove()
        posed = model.best_queries(output.logits[None]).tolist()                   # whose maps these are
        attention = maps[-1].float().flatten(2).softmax(-1).view(maps[-1].shape).cpu().numpy()
        tiles = []
        for row in rows.tolist():
            tiles += draw_attention(image.crop([round(x) for x in boxes[row].tolist()]), attention[posed.index(row)])
        shown["attention"] = [draw.contact_sheet(tiles, 1 + attention.shape[1], 192)]
    return shown


# ---- Training -----------------------------------------------------------------------------------------------


def build_optimizer(model: QueryPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW in three groups: backbone and flow learn at rates of their own."""
    rates = dict(backbone=cfg.lr_backbone, flow=cfg.lr_flow)
    groups = [dict(params=[p for p in getattr(model, name).parameters() if p.requires_grad], initial_lr=rate)
              for name, rate in rates.items()]
    rest = [p for name, p in model.named_parameters() if name.split(".")[0] not in rates]
    groups.append(dict(params=rest, initial_lr=cfg.lr))
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def lr_scale(step: int, steps: int, epoch: int, cfg: Config) -> float:
    """Factor on the learning rates at an optimiser step out of `steps`; the warm-up starts at 1/100."""
    scale = min(1.0, 0.01 + 0.99 * step / cfg.warmup) if cfg.warmup else 1.0
    if cfg.schedule == "cosine":
        scale *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return scale * 0.1 ** sum(epoch >= drop for drop in runtime.numbers(cfg.drop_epochs) or ())


def batch_losses(net: nn.Module, model: QueryPose, images: Tensor, sizes: Tensor, targets: list[Targets],
                 ranks: runtime.Ranks) -> dict[str, Tensor]:
    """Forward pass of `net`, which is the model or distributes it, and loss terms of one batch.

    With `matched`, boxes of all stages are matched before any pose is computed.
    Raises FloatingPointError if one of them is not finite.
    """
    images = images.to(ranks.device, non_blocking=True, memory_format=torch.channels_last)
    targets, matchings = [t.to(ranks.device) for t in targets], []

    def choose(found: list[tuple[Tensor, Tensor]]) -> Tensor:
        matchings.extend(match(found, targets))
        needed = torch.zeros_like(found[0][0], dtype=torch.bool)
        for image, query, _ in matchings:
            needed[image, query] = True
        return needed

    with runtime.autocast(ranks.device, model.cfg.amp):
        stages = net(images, sizes.to(ranks.device), choose if model.cfg.matched else None)["stages"]
    matchings = matchings or match([output[:2] for output in stages], targets)
    losses = criterion(stages, matchings, targets, model.flow.log_prob)
    losses["unused"] = 0 * model.parts.sum()         # a gradient for DistributedDataParallel, where nothing reads them
    finite = torch.stack([*losses.values()]).isfinite().tolist()        # one wait for the GPU, not one per term
    if not all(finite):
        raise FloatingPointError(", ".join([name for name, good in zip(losses, finite) if not good][:5]))
    return losses


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep everything in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = runtime.init_distributed(args.device)
    if cfg.batch % (cfg.accum * ranks.world):
        raise runtime.UserError(f"--batch {cfg.batch} does not split over {ranks.world} processes x {cfg.accum} "
                                "micro-batches: choose a multiple")
    if cfg.frozen_norm and not (cfg.init or args.saved):
        raise runtime.UserError("frozen norms need start weights: add --init resnet50 (or another), or "
                                "--no-frozen_norm")
    with runtime.rank_zero_first(ranks):                         # it makes the puppets and fetches start weights
        train_split, val_split = default_splits(cfg.data)
        data = open_dataset(cfg.data, train_split, sigmas=runtime.numbers(cfg.sigmas))
        held_out = open_dataset(cfg.data, val_split, skeleton=data.skeleton)
        runtime.seed_all(cfg.seed)                               # equal start weights on every process
        model = QueryPose(cfg, data.skeleton)
        if cfg.init and not args.saved:
            load_init(model, cfg.init)
    model.to(ranks.device, memory_format=torch.channels_last)
    ema = runtime.Ema(model, cfg.ema, cfg.ema_warmup)
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=cfg.amp == "fp16" and ranks.device.type == "cuda")
    at = dict(epoch=0, done=0, step=0, best=-math.inf)           # done: optimiser steps of this epoch
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    if args.saved:
        runtime.restore(parts, args.saved)
        at = {name: args.saved[name] for name in at}
    run = runtime.Run("querypose", cfg, args, ranks)
    args.saved = None                                            # its memory is ours again
    run.say(f"{data.report()}\n{held_out.report()}\nwriting to {run.folder}")
    net = runtime.distribute(model, ranks)

    data, micro = data.training(), cfg.batch // (cfg.accum * ranks.world)
    per_epoch = len(runtime.epoch_batches(len(data), micro, cfg.accum, cfg.seed, 0, ranks))
    steps = cfg.epochs * per_epoch // cfg.accum

    def save_last(save) -> None:
        save("last.pt", **at, skeleton=data.skeleton.to_dict(), **runtime.states(parts))

    stop = runtime.Stopper()
    if at["epoch"] >= cfg.epochs:
        run.say(f"all {cfg.epochs} epochs are done; --epochs {2 * cfg.epochs} would go on")
    for epoch in range(at["epoch"], cfg.epochs):
        todo = runtime.epoch_batches(len(data), micro, cfg.accum, cfg.seed, epoch, ranks)[at["done"] * cfg.accum:]
        loader = DataLoader(TrainImages(data, cfg, epoch), batch_sampler=todo, num_workers=cfg.workers,
                            collate_fn=partial(collate, join=pad_images), worker_init_fn=runtime.ignore_signals,
                            pin_memory=ranks.device.type == "cuda")
        bar = tqdm(loader, f"epoch {epoch + 1}/{cfg.epochs}", per_epoch, initial=per_epoch - len(todo),
                   disable=ranks.rank > 0, dynamic_ncols=True)
        net.train()
        seen = []                                                # ids of the images of this optimiser step
        for i, ((images, sizes), targets, skipped) in enumerate(bar, per_epoch - len(todo)):
            run.bad_files(sum(skipped, []))
            seen += [t.image_id for t in targets]
            runtime.seed_all(cfg.seed, epoch, i, ranks.rank)
            factor = lr_scale(at["step"], steps, epoch, cfg)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            try:
                losses = batch_losses(net, model, images, sizes, targets, ranks)
            except FloatingPointError as error:
                raise run.not_finite(str(error), at["step"], seen) from None
            scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if (i + 1) % cfg.accum:
                continue
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            if not (norm.isfinite() or scaler.is_enabled()):     # a scaler leaves such steps out by itself
                raise run.not_finite("the gradient", at["step"], seen)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model)
            at.update(step=at["step"] + 1, done=at["done"] + 1)
            seen = []

            if at["step"] % 20 == 0:                             # reading numbers makes a GPU wait
                final = {name: losses[name].item() for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_kps")}
                total = sum(losses.values()).item()
                run.log(step=at["step"], epoch=epoch, loss=total, **final, grad_norm=float(norm),
                        lr=group["lr"])
                bar.set_postfix(loss=f"{total:.1f}", keypoints=f"{final['loss_kps']:.2f}")
            if stop(ranks):
                save_last(run.save)
                run.say(f"stopped and saved; go on with --resume {run.folder}")
                return
            if run.save_is_due():
                save_last(run.try_save)

        last = epoch + 1 == cfg.epochs
        if last or (epoch + 1) % cfg.eval_every == 0:
            save_last(run.try_save)                              # a kill while evaluating costs nothing
            runtime.share_buffers(ema)
            table, predictions = evaluate(ema.module, held_out, cfg, ranks)
            run.log(step=at["step"], epoch=epoch, **table)
            run.say(f"epoch {epoch + 1}\n{metrics.format_table(table)}")
            if table["AP"] > at["best"]:
                at["best"] = table["AP"]
                run.try_save("best.pt", **at, skeleton=data.skeleton.to_dict(), model=ema.module.state_dict(),
                             metrics=table)
            run.draw(held_out, predictions)
            if last and cfg.data == "puppets":
                table, _ = evaluate(ema.module, open_crowd(data.skeleton, ranks), cfg, ranks)
                run.say(f"puppets in crowds, E/M/H: easy, medium and hard\n{metrics.format_table(table)}")
        run.bad_files(runtime.gather_lists([*run.bad, *held_out.bad]))
        at.update(epoch=epoch + 1, done=0)
        save_last(run.save if last else run.try_save)            # at the very end a full disk is an error


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops(model: QueryPose, width: int, height: int) -> float:
    """FLOPs of one image: 2 per multiply-add of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        model.requires_grad_(False)(torch.zeros(1, 3, height, width), torch.tensor([[width, height]]))
    return counter.get_total_flops()


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one image with poses for the best queries, and for all of them."""
    rows = [f"{'preset':16}{'input':>9}{'parameters':>13}{'learned':>11}{'GFLOPs':>9}{'all poses':>11}"]
    for preset in PRESETS:
        with torch.device("meta"):                                       # shapes without numbers
            best, everyone = (build(preset, prune=prune).eval() for prune in (True, False))
        height = min(best.cfg.short_side, 480)
        width = min(height * 4 // 3, best.cfg.long_side)
        every, learned = sum(p.numel() for p in best.parameters()) / 1e6, count_parameters(best) / 1e6
        cost, cost_of_all = (flops(model, width, height) / 1e9 for model in (best, everyone))
        rows.append(f"{preset:16}{f'{width}x{height}':>9}{every:>11.2f} M{learned:>9.2f} M{cost:>9.1f}"
                    f"{cost_of_all:>11.1f}")
    return "\n".join(rows)


def main() -> None:
    cfg, args = runtime.parse(Config, PRESETS, __doc__)
    if args.train:
        runtime.launch(train, cfg, args, cfg.processes)
    else:
        print(f"{__doc__}\n{summary()}")


if __name__ == "__main__":
    runtime.run_main(main)
