"""Geometry against the released data pipeline (golden files), and what must hold for any image."""
import numpy as np
import pytest
import torch
from PIL import Image

from common import transforms as T
from common.errors import UserError
from common.records import Sample
from tests.helpers import golden

PAIRS = {17: (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15),
         14: (1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 12, 13)}
golden_files = golden("detrpose/golden_data_pipeline*.npz")


def sample_of(image: np.ndarray, boxes: np.ndarray, keypoints: np.ndarray, areas: np.ndarray) -> Sample:
    h, w = image.shape[:2]
    return Sample(Image.fromarray(image), 1, (w, h), keypoints, boxes, areas, np.zeros(len(boxes), bool))


def from_golden(case, prefix: str = "in_", image: str = "image") -> Sample:
    return sample_of(case[image], *(case[prefix + name] for name in ("boxes", "keypoints", "area")))


def mosaic_sources(case) -> list[Sample]:
    return [from_golden(case)] + [from_golden(case, f"mosaic_src{i}_", f"mosaic_src{i}") for i in (1, 2, 3)]


def random_sample(seed: int, w: int = 50, h: int = 30) -> Sample:
    rng = np.random.default_rng(seed)
    keypoints = np.concatenate([rng.uniform(0, 29, (3, 17, 2)), rng.integers(0, 3, (3, 17, 1))], 2).astype(np.float32)
    keypoints[keypoints[..., 2] == 0] = 0
    boxes = np.float32([[2, 3, 20, 22], [-4, 5, 9, 40], [30, 10, 49, 29]])
    return sample_of(rng.integers(0, 256, (h, w, 3), np.uint8), boxes, keypoints, np.float32([300, 200, 100]))


def assert_target(sample: Sample, golden, prefix: str):
    """The final step of the released pipeline: everything divided by the image size, boxes as cxcywh, v in {0, 1}."""
    size = np.float32(sample.size)
    lo, hi = sample.boxes[:, :2], sample.boxes[:, 2:]
    visible = (sample.keypoints[..., 2] > 0).astype(np.float32)
    xy = sample.keypoints[..., :2] / size * visible[..., None]
    close = dict(rtol=0, atol=1e-6)
    boxes = np.concatenate([(lo + hi) / 2 / size, (hi - lo) / size], 1)
    keypoints = np.concatenate([xy.reshape(len(xy), -1), visible], 1)
    np.testing.assert_allclose(boxes, golden[prefix + "boxes"], **close)
    np.testing.assert_allclose(keypoints, golden[prefix + "keypoints"], **close)
    np.testing.assert_allclose(sample.areas / size.prod(), golden[prefix + "area"], **close)


@golden_files
@pytest.mark.parametrize("case", ["plain", "flip", "pad", "mosaic_final"])
def test_released_pipeline_gives_the_same_images_and_targets(file, case):
    golden = np.load(file)
    h, w = golden["resized"].shape[:2]
    sample = from_golden(golden)
    if case == "flip":
        sample = T.hflip(sample, PAIRS[17])
    elif case == "pad":
        x, y = ((golden["pad_size_wh"] - sample.size) // 2).tolist()
        sample = T.pad(sample, x, y, x, y)
    elif case == "mosaic_final":
        sample = T.mosaic(mosaic_sources(golden), 32)
    final = T.resize(sample, (w, h))
    image = {"plain": "resized", "flip": "flip_resized", "pad": "pad_resized"}.get(case)
    if image:
        np.testing.assert_array_equal(np.array(final.image), golden[image])
    assert_target(final, golden, case + "_")


@golden_files
def test_released_mosaic_is_ours_in_pixels(file):
    golden = np.load(file)
    ours = T.mosaic(mosaic_sources(golden), 32)
    np.testing.assert_array_equal(np.array(ours.image), golden["mosaic_image"])
    np.testing.assert_allclose(ours.boxes, golden["mosaic_boxes"], rtol=1e-6)
    np.testing.assert_allclose(ours.keypoints, golden["mosaic_keypoints"], rtol=1e-6)
    np.testing.assert_allclose(ours.areas, golden["mosaic_area"], rtol=1e-6)


def test_very_large_and_very_thin_pictures_take_little_memory():
    small, large = random_sample(0), sample_of(np.zeros((20, 400, 3), np.uint8), *(np.zeros((0, *n)) for n in ((4,), (17, 3), ())))
    assert T.shrink(small, 50) is small and T.shrink(large, 100).size == (100, 5)
    half = T.shrink(small, 25)
    assert half.size == (25, 15) and np.allclose(half.boxes, small.boxes / 2) and np.allclose(half.areas, small.areas / 4)
    thin = [sample_of(np.zeros((h, w, 3), np.uint8), *(np.zeros((0, *n)) for n in ((4,), (17, 3), ())))
            for w, h in ((6, 3000), (3000, 6), (60, 40), (40, 60))]
    assert T.mosaic(thin, 32).size == (1000, 1000)                  # not 2 * 16,000: 500 is the longer side beside 1


@golden_files
def test_released_colour_steps_are_ours_to_the_last_bit(file):
    golden = np.load(file)
    image = Image.fromarray(golden["image"])
    ours = {"brightness": T.brightness(image, 1.3), "contrast": T.contrast(image, 0.7),
            "saturation": T.saturation(image, 1.4), "hue": T.hue(image, 0.2), "hue_neg": T.hue(image, -0.35)}
    for name, result in ours.items():
        np.testing.assert_array_equal(np.array(result), golden["jit_" + name], err_msg=name)


@golden_files
def test_crowdpose_uses_its_own_pairs_and_the_area_of_053_boxes(file):
    golden = np.load(file)
    boxes = golden["crowd_in_boxes"]
    areas = 0.53 * (boxes[:, 2:] - boxes[:, :2]).prod(1)
    sample = sample_of(golden["image"], boxes, golden["crowd_in_keypoints"], areas)
    h, w = golden["resized"].shape[:2]
    assert_target(T.resize(sample, (w, h)), golden, "crowd_plain_")
    assert_target(T.resize(T.hflip(sample, PAIRS[14]), (w, h)), golden, "crowd_flip_")


def test_mirroring_twice_is_no_change_and_the_input_is_left_alone():
    sample, before = random_sample(1), random_sample(1)
    twice = T.hflip(T.hflip(sample, PAIRS[17]), PAIRS[17])
    for name in ("keypoints", "boxes", "areas"):
        np.testing.assert_allclose(getattr(twice, name), getattr(before, name), atol=1e-5)
        np.testing.assert_array_equal(getattr(sample, name), getattr(before, name))
    assert twice.image.tobytes() == before.image.tobytes() == sample.image.tobytes()


def test_a_keypoint_stays_on_its_pixel_when_mirrored_and_changes_its_name():
    sample = random_sample(2)
    sample.image.putpixel((7, 11), (255, 0, 255))
    sample.keypoints[0, 5] = 7, 11, 2                                   # left shoulder
    mirrored = T.hflip(sample, PAIRS[17])
    x, y, v = mirrored.keypoints[0, 6]                                  # right shoulder
    assert (v, mirrored.image.getpixel((int(x), int(y)))) == (2, (255, 0, 255))


def test_mirroring_without_left_right_pairs_is_refused():
    with pytest.raises(UserError, match="cannot be mirrored"):
        T.hflip(random_sample(3), None)


def test_resizing_scales_areas_and_padding_keeps_them():
    sample = random_sample(4)
    np.testing.assert_allclose(T.resize(sample, (100, 90)).areas, sample.areas * 6, rtol=1e-6)
    padded = T.pad(sample, 3, 4, 5, 6)
    assert padded.size == padded.image.size == (58, 40)
    np.testing.assert_array_equal(padded.areas, sample.areas)
    np.testing.assert_array_equal(padded.boxes - sample.boxes, np.float32([[3, 4, 3, 4]] * 3))


@pytest.mark.parametrize("step", [lambda s: T.resize(s, (80, 20)), lambda s: T.pad(s, 9, 9, 9, 9),
                                  lambda s: T.mosaic([s] * 4, 16)])
def test_unlabelled_keypoints_stay_at_zero(step):
    after = step(random_sample(5)).keypoints
    assert (after[..., 2] == 0).any() and not after[after[..., 2] == 0].any()


def test_short_side_is_kept_for_portrait_landscape_and_square():
    for (w, h), expected in {(60, 40): (48, 32), (40, 61): (32, 48), (9, 9): (32, 32)}.items():
        assert T.resize_short_side(random_sample(6, w, h), 32).size == expected


def test_the_longer_side_is_limited_by_shrinking_the_shorter_one():
    assert T.short_side_size((60, 40), 32, 48) == (48, 32) and T.short_side_size((60, 40), 32, 45) == (45, 30)
    assert T.resize_short_side(random_sample(6, 30, 90), 32, 64).size == (21, 63)


def test_a_crop_keeps_pixels_boxes_and_keypoints_together():
    sample = random_sample(12)
    sample.track_ids = np.arange(3)
    cut = T.crop(sample, 3, 4, 20, 15)
    assert cut.size == (20, 15) and cut.image.getpixel((5, 6)) == sample.image.getpixel((8, 10))
    np.testing.assert_array_equal(cut.boxes, np.float32([[0, 0, 17, 15], [0, 1, 6, 15]]))       # of the third: nothing
    np.testing.assert_array_equal(cut.areas, np.float32([17 * 15, 6 * 14]))
    np.testing.assert_array_equal(cut.track_ids, [0, 1])
    labelled = sample.keypoints[:2, :, 2] > 0
    np.testing.assert_array_equal(cut.keypoints[..., 2], sample.keypoints[:2, :, 2])
    expected = (sample.keypoints[:2, :, :2] - [3, 4]).clip(0, [20, 15])
    np.testing.assert_allclose(cut.keypoints[..., :2], np.where(labelled[..., None], expected, 0), atol=1e-5)


def test_filter_keeps_labelled_people_with_a_box_inside():
    sample = random_sample(7)
    sample.track_ids = np.arange(3)
    sample.iscrowd[2] = True
    kept = T.filter_people(sample)
    np.testing.assert_array_equal(kept.boxes, np.float32([[2, 3, 20, 22], [0, 5, 9, 30]]))
    np.testing.assert_array_equal(kept.track_ids, [0, 1])
    sample.keypoints[0, :, 2] = 0                                       # nobody labelled
    sample.boxes[1] = -9, 5, -1, 9                                      # left of the image
    empty = T.filter_people(sample)
    assert empty.keypoints.shape == (0, 17, 3) and empty.boxes.shape == (0, 4) and empty.areas.shape == (0,)


def test_people_may_be_absent_in_every_step():
    nobody = T.filter_people(random_sample(8))
    nobody.iscrowd[:] = True
    nobody = T.filter_people(nobody)
    changed = T.mosaic([T.pad(T.hflip(nobody, PAIRS[17]), 1, 2, 3, 4)] * 4, 20)
    assert changed.keypoints.shape == (0, 17, 3) and changed.boxes.shape == (0, 4)


def test_jitter_follows_its_generator_only():
    image = random_sample(9).image
    first, again = (T.color_jitter(image, np.random.default_rng(3)).tobytes() for _ in range(2))
    assert first == again != image.tobytes()
    assert T.color_jitter(image, np.random.default_rng(4)).tobytes() != first
    same = T.color_jitter(image, np.random.default_rng(3), strength=0, turn=0)
    assert np.abs(np.array(same, int) - np.array(image, int)).mean() < 2    # HSV and back costs a few levels


def test_neighbouring_frames_follow_the_image():
    sample = random_sample(10)
    sample.frames = (sample.image.copy(), sample.image.copy())
    changed = T.resize(T.pad(T.hflip(sample, PAIRS[17]), 1, 2, 3, 4), (40, 40))
    assert all(frame.tobytes() == changed.image.tobytes() for frame in changed.frames) and len(changed.frames) == 2


def test_tensor_is_the_picture_divided_by_255():
    sample = random_sample(11)
    tensor = T.to_tensor(sample.image)
    assert tensor.shape == (3, 30, 50) and tensor.dtype == torch.float32
    np.testing.assert_array_equal((tensor * 255).round().permute(1, 2, 0).numpy(), np.array(sample.image))


@pytest.mark.parametrize("matrix", [[[1, 0, 0], [0, 1, 0]], [[1.7, 0.3, -4], [-0.2, 2.1, 3]], [[0.5, 0, -40], [0, 0.5, 2]]])
def test_warp_reads_each_pixel_of_the_crop_where_the_inverse_matrix_says(matrix):
    image = np.random.default_rng(0).integers(0, 256, (11, 14, 3), dtype=np.uint8)
    crop = T.warp_affine(image, np.array(matrix), (16, 12))
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    padded = np.pad(image.astype(float), [(1, 2), (1, 2), (0, 0)])      # black outside
    for y, x in np.ndindex(12, 16):
        u, v, _ = inverse @ [x, y, 1]
        expected = np.zeros(3)
        if -1 < u < 14 and -1 < v < 11:
            i, j = int(np.floor(v)) + 1, int(np.floor(u)) + 1
            b, a = v - np.floor(v), u - np.floor(u)
            expected = (1 - b) * ((1 - a) * padded[i, j] + a * padded[i, j + 1]) \
                + b * ((1 - a) * padded[i + 1, j] + a * padded[i + 1, j + 1])
        assert np.abs(crop[y, x] - expected).max() <= 0.51, (x, y)
