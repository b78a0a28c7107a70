"""From the network's grid back to the file's."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep
from torch import Tensor


class KeepOnlyAffined(MapTransform):
    """Drop all metadata of MetaTensors but the affine; a cache file then loads with ``weights_only``."""

    def __call__(self, data: Mapping) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = MetaTensor(d[key].as_tensor(), affine=d[key].affine)
        return d


class InvertArgmaxd(MapTransform):
    """Turn class scores on the network's grid into a label map, uint8, on the file's grid.

    Scores are interpolated linearly before the largest wins, so borders are smooth if the file's grid is finer. MONAI's
    ``Invertd`` would hold all classes at the file's resolution: 850 MB for 18 classes of a 1 mm head. The mapping
    follows from the affines alone, so any preprocessing that keeps the affine is undone.

    Args:
        keys: scores ``(classes, *S)``.
        orig_keys: the preprocessed image ``(C, *S)`` of each key, a MetaTensor with ``original_affine`` and
            ``spatial_shape`` of its file.
        class_names: of the labels from 1 on, for pictures and DICOM: ``class_names`` in the metadata of the label map.
            None, or names that are not as many as the classes: "structure 1" and so on.
        allow_missing_keys: do not raise if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        orig_keys: KeysCollection = "image",
        class_names: Sequence[str] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.orig_keys, self.class_names = ensure_tuple_rep(orig_keys, len(self.keys)), list(class_names or ())

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, orig_key in self.key_iterator(d, self.orig_keys):
            image = d[orig_key]
            affine, shape = image.meta["original_affine"], image.meta["spatial_shape"]
            scores = torch.as_tensor(d[key]).as_subclass(Tensor)
            labels = argmax_on_grid(scores, image.affine, [int(side) for side in shape], affine)
            names = [f"structure {i}" for i in range(1, len(scores))]
            names = self.class_names if len(self.class_names) == len(names) else names
            meta = {name: value for name, value in image.meta.items() if name != "affine"} | {"class_names": names}
            d[key] = MetaTensor(labels[None], affine=torch.as_tensor(affine, dtype=torch.float64), meta=meta)
        return d


def argmax_on_grid(
    scores: Tensor,
    affine: Tensor | np.ndarray,
    shape: Sequence[int],
    target_affine: Tensor | np.ndarray,
    slab_voxels: int = 2**22,
) -> Tensor:
    """The class with the largest score, linearly interpolated, at each voxel of a target grid.

    Args:
        scores: ``(classes, X, Y, Z)``, at most 256 classes. Outside, the nearest voxel's scores hold.
        affine: of the scores, voxels to mm, ``(4, 4)``.
        shape: of the target grid, three sides.
        target_affine: of the target grid, voxels to mm, ``(4, 4)``.
        slab_voxels: scores that are interpolated at a time; the target grid is filled slab by slab.

    Returns:
        uint8 of the given shape, on the device of the scores.
    """
    to_scores = np.linalg.solve(np.asarray(affine, float), np.asarray(target_affine, float))[:3]
    labels = torch.empty(tuple(shape), dtype=torch.uint8, device=scores.device)
    step = max(1, slab_voxels // (scores.shape[0] * shape[1] * shape[2]))
    axes = np.abs(to_scores[:, :3]).argmax(axis=0)  # axis of the scores along each axis of the target grid
    oblique = to_scores[:, :3].copy()
    oblique[axes, range(3)] = 0
    aligned = len(set(axes)) == 3 and np.abs(oblique * np.asarray(shape)).max() < 1e-3  # voxels, across the grid
    interpolated = (
        _interpolate_by_axis(scores, to_scores, axes, shape, step)
        if aligned
        else _interpolate(scores, to_scores, shape, step)
    )
    for rows, slab in interpolated:
        labels[rows] = slab.max(dim=0).indices.to(torch.uint8)  # on a CPU faster than argmax
    return labels


def _interpolate_by_axis(
    scores: Tensor, to_scores: np.ndarray, axes: np.ndarray, shape: Sequence[int], step: int
) -> Iterator[tuple[slice, Tensor]]:
    """Slabs of a grid whose axes are parallel to those of the scores: matrix products, faster than ``grid_sample``."""
    scores = scores.permute(0, *(1 + axes))
    weights = []
    for i, (axis, n, side) in enumerate(zip(axes, shape, scores.shape[1:], strict=True)):
        at = (to_scores[axis, i] * np.arange(n) + to_scores[axis, 3]).clip(0, side - 1)
        weights.append((1 - np.abs(at[:, None] - np.arange(side))).clip(0))  # of each score for each voxel
    x, (y, z) = weights[0], (torch.from_numpy(w).to(scores) for w in weights[1:])
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        seen = np.flatnonzero(x[rows].any(axis=0))
        seen = slice(seen[0], seen[-1] + 1)
        slab = torch.from_numpy(x[rows, seen]).to(scores) @ scores[:, seen].flatten(2)
        yield rows, y @ slab.unflatten(2, scores.shape[2:]) @ z.T


def _interpolate(
    scores: Tensor, to_scores: np.ndarray, shape: Sequence[int], step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Slabs of an oblique grid."""
    sides = torch.tensor(scores.shape[1:], dtype=torch.float64)
    # grid_sample takes coordinates from -1 to 1, in the order z, y, x
    to_unit = (2 / (sides - 1).clamp(min=1))[:, None] * torch.from_numpy(to_scores)
    to_unit[:, 3] -= 1
    to_unit = to_unit.flip(0).to(scores.device, torch.float32)
    j, k = torch.meshgrid(*(torch.arange(n, device=scores.device) for n in shape[1:]), indexing="ij")
    in_slice = j[..., None] * to_unit[:, 1] + k[..., None] * to_unit[:, 2] + to_unit[:, 3]  # Y Z 3
    for i in torch.arange(shape[0], device=scores.device).split(step):
        points = in_slice + i[:, None, None, None] * to_unit[:, 0]
        yield i, F.grid_sample(scores[None], points[None], padding_mode="border", align_corners=True)[0]
