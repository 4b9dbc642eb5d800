"""Object keypoint similarity, of arrays and of tensors, and what top-down methods do with it before they are scored."""
from collections.abc import Sequence

import numpy as np
from torch import Tensor


# ---------------------------------------------------------------- object keypoint similarity

def oks_terms(pred: np.ndarray, target: np.ndarray, area: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """exp(-e) of each keypoint, e = d² / (2 (2σ)² area): (..., K, 2), (..., K, 2), (...) -> (..., K)."""
    squared = ((pred[..., :2] - target[..., :2]) ** 2).sum(-1)
    variances = (2 * np.asarray(sigmas)) ** 2
    return np.exp(-squared / (2 * variances * (np.asarray(area)[..., None] + np.spacing(1))))


def oks(pred: np.ndarray, target: np.ndarray, area: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """Mean over the labelled keypoints (v > 0) of exp(-e), in [0, 1]; the leading dimensions broadcast.

    Takes    pred (..., K, 2);  target (..., K, 3);  area (...) of the target;  sigmas (K,)
    Returns  (...). A target without labels gives 0
    """
    labelled = target[..., 2] > 0
    terms = oks_terms(pred, target, area, sigmas)
    return (terms * labelled).sum(-1) / np.maximum(labelled.sum(-1), 1)


def oks_matrix(pred: np.ndarray, target: np.ndarray, areas: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """OKS of every prediction with every annotated person: (D, K, 2), (G, K, 3), (G,) -> (D, G)."""
    return oks(pred[:, None], target[None], areas[None], sigmas)


# ---------------------------------------------------------------- top-down scoring: rescoring and OKS-NMS

def rescore(box_scores: np.ndarray, keypoint_scores: np.ndarray, threshold: float = 0.2) -> np.ndarray:
    """Box score times the mean of the keypoint scores above the threshold: (P,), (P, K) -> (P,)."""
    kept = keypoint_scores > threshold
    return box_scores * (keypoint_scores * kept).sum(-1) / np.maximum(kept.sum(-1), 1)


def pose_similarity(keypoints: np.ndarray, areas: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """OKS between predictions, over all keypoints, with the mean of the two areas. (P, K, 2), (P,) -> (P, P)"""
    mean_areas = (areas[:, None] + areas[None]) / 2
    return oks_terms(keypoints[:, None], keypoints[None], mean_areas, sigmas).mean(-1)


def oks_nms(keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: Sequence[float],
            threshold: float = 0.9) -> list[int]:
    """Indices to keep, best first: whoever resembles a better one by more than the threshold goes."""
    similar = pose_similarity(keypoints, areas, sigmas) > threshold
    keep = []
    for i in np.argsort(-scores, kind="stable"):
        if not similar[i, keep].any():
            keep.append(int(i))
    return keep


# ---------------------------------------------------------------- tensors, for losses

def similarity_of(squared: Tensor, visible: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """OKS = Σ v exp(−d² / (2 s² κ²)) / Σ v,  κ = 2σ, s² = area; at least 1e-6, so that it has a logarithm.

    squared d² (..., P, K);  visible v (P, K);  areas (P,) in the units of d²;  sigmas (K,). Returns (..., P).
    """
    exponent = squared / (2 * areas[:, None] * (2 * sigmas) ** 2)
    similarity = (visible * (-exponent).exp()).sum(-1) / (visible.sum(-1) + 1e-6)
    return similarity.clamp(min=1e-6)
