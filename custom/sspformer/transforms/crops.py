"""Random crops of many scans at once: place, scale, rotation and flips in one batched resampling.

:class:`CropSampler` draws, for every crop of a batch, the matrix that leads from its voxels to those of its scan;
:func:`resample` follows the matrices. Both run on the device of their tensors, without a loop over crops and without
waiting for the device. The scans need not have one shape: they lie one after the other in a flat tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor


def resample(
    voxels: Tensor,
    offset: Tensor,
    shape: Tensor,
    matrix: Tensor,
    size: Sequence[int],
    nearest: bool = False,
    mirror: bool = False,
) -> Tensor:
    """Crops of scans that lie one after the other in a flat tensor.

    Values between voxels are interpolated linearly. A voxel reaches half a voxel beyond its centre; further out there
    is air, 0, or the scan mirrored.

    Args:
        voxels: all scans, ``(total,)``, each with its last axis fastest.
        offset: where the scan of each crop begins, ``(B,)``, int64.
        shape: its sides, ``(B, 3)``, int64.
        matrix: of each crop, voxels of the crop to voxels of the scan, ``(B, 3, 4)``, float32.
        size: sides of the crops, three numbers.
        nearest: take the nearest voxel, for label maps.
        mirror: beyond its ends a scan is mirrored.

    Returns:
        ``(B, *size)``: float32, or with ``nearest`` of the type of ``voxels``.
    """
    device = voxels.device
    axes = [torch.arange(side, device=device, dtype=torch.float32) for side in size]
    i, j, k = axes[0][:, None, None], axes[1][:, None], axes[2]
    strides = torch.stack([shape[:, 1] * shape[:, 2], shape[:, 2], torch.ones_like(offset)], dim=1)
    index, inside, share, step = offset[:, None, None, None], torch.ones((), dtype=torch.bool, device=device), [], []
    for axis in range(3):
        a, b, c, d = (matrix[:, axis, n, None, None, None] for n in range(4))
        side, stride = shape[:, axis, None, None, None], strides[:, axis, None, None, None]
        point = (a * i + d) + b * j + c * k  # B *size
        if mirror:  # a triangle wave: -0.5 and side - 0.5 are the mirrors
            point = (side - ((point + 0.5) % (2 * side) - side).abs()) - 0.5
        inside = inside & (point >= -0.5) & (point <= side - 0.5)
        if nearest:
            index = index + torch.minimum(point.round().clamp_min_(0), side - 1.0).long() * stride
            continue
        first = torch.minimum(point.floor().clamp_min_(0), (side - 2.0).clamp_min(0))
        index = index + first.long() * stride
        share.append((point - first).clamp_(0, 1))
        step.append(torch.where(side > 1, stride, 0))
    if nearest:
        return voxels[index] * inside
    x, y, z = step
    lines = []
    for line in (index, index + x):
        ends = [torch.lerp(voxels[at].float(), voxels[at + z].float(), share[2]) for at in (line, line + y)]
        lines.append(torch.lerp(*ends, share[1]))
    return torch.lerp(*lines, share[0]).mul_(inside)


class CropSampler:
    """Draws where in its scan each crop of a batch lies, and how it is scaled, turned and flipped.

    A crop is turned in mm, so anisotropic voxels do not shear anatomy. One that is neither scaled nor turned lies on
    the voxels of its scan and is not interpolated.

    Args:
        crop_size: voxels along each axis; two numbers give slices of the first two axes.
        scale: spacing of a crop over that of its scan, ``(low, high)`` or one number, drawn for each axis.
        rotate: largest angle about each axis, rad, 0 or more.
        prob: share of the crops that are scaled and turned.
        flip_prob: probability of a flip along each axis, one number or one for each axis.
        margin: how far a crop may reach beyond its scan, a share of its sides, 0 or more. A scan smaller than the crop
            lies anywhere in it, as a whole.
        mirror: beyond its ends a scan is mirrored, in place of air.

    Raises:
        ValueError: if a range is out of order or a share out of its range.
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        scale: float | Sequence[float] = 1.0,
        rotate: float = 0.0,
        prob: float = 1.0,
        flip_prob: float | Sequence[float] = 0.0,
        margin: float = 0.0,
        mirror: bool = False,
    ) -> None:
        self.spatial_dims = len(crop_size)
        if self.spatial_dims not in (2, 3) or min(crop_size) < 1:
            raise ValueError(f"crop_size must be two or three sides above 0, got {list(crop_size)}.")
        bounds = (scale, scale) if isinstance(scale, (int, float)) else tuple(scale)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"scale must be a number or (low, high) above 0, got {scale}.")
        flips = ensure_tuple_rep(flip_prob, self.spatial_dims)
        if not all(0 <= p <= 1 for p in (prob, *flips)):
            raise ValueError(f"prob and flip_prob must be between 0 and 1, got {prob} and {flip_prob}.")
        if rotate < 0 or margin < 0:
            raise ValueError(f"rotate and margin must be 0 or more, got {rotate} and {margin}.")
        self.size = tuple(int(side) for side in (*crop_size, 1)[:3])
        self.scale, self.rotate, self.prob, self.margin = bounds, rotate, prob, margin
        self.flip_prob, self.mirror = (*flips, 0.0)[:3], mirror
        self.on_grid = bounds == (1, 1) and rotate == 0  # every crop lies on the voxels of its scan
        self._constants: dict[torch.device, tuple[Tensor, ...]] = {}

    def constants(self, device: torch.device) -> tuple[Tensor, ...]:
        """On the device, made once: sides, flip probabilities, and which axes are scaled and turned about."""
        if device not in self._constants:
            solid = float(self.spatial_dims == 3)  # slices keep their thickness, and turn about their normal only
            rows = (self.size, self.flip_prob, (1.0, 1.0, solid), (solid, solid, 1.0))
            self._constants[device] = torch.tensor(rows, dtype=torch.float32, device=device).unbind()
        return self._constants[device]

    def __call__(
        self, shape: Tensor, spacing: Tensor, generator: torch.Generator | None = None, near: Tensor | None = None
    ) -> Tensor:
        """Matrices from voxels of the crops to voxels of their scans, ``(B, 3, 4)``, float32.

        Args:
            shape: sides of the scan of each crop, ``(B, 3)``.
            spacing: its voxel spacing, mm, ``(B, 3)``.
            generator: on their device.
            near: a voxel of the scan for each crop to contain, at a random place, ``(B, 3)``; NaN: the crop may lie
                anywhere. It reaches no further beyond its scan for that: a turned one may miss a voxel at the border.
        """
        n, device = shape.shape[0], shape.device
        size, flip_prob, scaled, turned = self.constants(device)
        chosen = torch.rand(n, 1, generator=generator, device=device) < self.prob
        for_scale, for_angle, for_flip, for_place = torch.rand(4, n, 3, generator=generator, device=device)
        low, high = self.scale
        scale = 1 + chosen * scaled * (low + (high - low) * for_scale - 1)
        rotation = _rotation(chosen * turned * (2 * for_angle - 1) * self.rotate)
        flip = 1 - 2 * (for_flip < flip_prob).float()
        step = rotation * (spacing * scale * flip)[:, None] / spacing[:, :, None]

        room = shape - scale * size
        reach = torch.where(room < 0, -room / 2, room / 2 + self.margin * size * scaled)
        middle, place = (shape - 1) / 2, for_place - 0.5
        centre = middle + 2 * place * reach
        if near is not None:
            from_middle = near + (step @ (place * (size - 1))[..., None])[..., 0] - middle
            from_middle = torch.minimum(torch.maximum(from_middle, -reach), reach)
            centre = torch.where(near.isnan(), centre, middle + from_middle)
        start = centre - (step @ (size - 1)[:, None])[..., 0] / 2
        if self.on_grid:
            chosen = torch.zeros_like(chosen)
        on_grid = ~chosen | (scaled == 0)
        return torch.cat([step, torch.where(on_grid, start.round(), start)[..., None]], dim=2)


def _rotation(angle: Tensor) -> Tensor:
    """Rotations by ``angle`` (B, 3), rad, about the third axis, then the second, then the first; ``(B, 3, 3)``."""
    (cx, cy, cz), (sx, sy, sz) = angle.cos().unbind(1), angle.sin().unbind(1)
    rows = [
        torch.stack([cy * cz, -cy * sz, sy], dim=1),
        torch.stack([cx * sz + sx * sy * cz, cx * cz - sx * sy * sz, -sx * cy], dim=1),
        torch.stack([sx * sz - cx * sy * cz, sx * cz + cx * sy * sz, cx * cy], dim=1),
    ]
    return torch.stack(rows, dim=1)
