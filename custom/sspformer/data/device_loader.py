"""Batches of random crops, drawn where the network is: all scans lie on its device, and no worker cuts crops."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

import torch
from ignite import distributed as idist
from monai.transforms import Randomizable
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..geometry import free_memory
from ..transforms.crops import CropSampler, resample

logger = logging.getLogger("sspformer")

#: where the scans lie while batches are drawn
RESIDENCES = ("device", "host", "disk")
#: share of the free memory that scans may take
MEMORY_SHARE = 0.5
#: scans after which it is judged whether all of them will fit
PROBED = 8
#: places that are drawn for a crop which is to have foreground, and the stride at which its voxels are looked at
TRIES, COARSE = 8, 4
#: sets the draws of places apart from those of masks and noise, whose seed is the same
PLACES = 0x5CA1AB1E
#: batches that are drawn ahead where the scans do not lie on the network's device
PREFETCH = 2


class ScanBuffer:
    """Scans of any shapes, and their label maps, one after the other in one flat tensor a key.

    Args:
        items: dictionaries with MetaTensors ``(1, X, Y, Z)`` at ``keys``, all of an item on one grid. Types are kept:
            float16 or uint8 save memory. Entries that are numbers, such as a target, are kept as well.
        keys: entries to keep.

    Raises:
        ValueError: if an item has several channels, is not 3D, or its keys differ in shape.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]], keys: Sequence[str] = ("image",)) -> None:
        first = [item[keys[0]] for item in items]
        for item in items:
            shapes = {tuple(item[key].shape) for key in keys}
            if len(shapes) > 1 or len(shape := shapes.pop()) != 4 or shape[0] != 1:
                raise ValueError(
                    f"scans on the device have one channel and three axes, the same for {', '.join(keys)}; got "
                    f"{[tuple(item[key].shape) for key in keys]} of {item[keys[0]].meta.get('filename_or_obj', 'one')}."
                )
        self.voxels = {
            key: torch.cat([torch.as_tensor(item[key]).as_subclass(Tensor).flatten() for item in items]) for key in keys
        }
        self.numbers = {name: torch.tensor([item[name] for item in items]) for name in _numbers(items)}
        self.shape = torch.tensor([scan.shape[1:] for scan in first])
        self.offset = self.shape.prod(dim=1).cumsum(0) - self.shape.prod(dim=1)
        self.affine = torch.stack([torch.as_tensor(scan.affine, dtype=torch.float32).cpu() for scan in first])
        self.spacing = self.affine[:, :3, :3].square().sum(dim=1).sqrt()

    def __len__(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the voxels."""
        return sum(voxels.nbytes for voxels in self.voxels.values())

    @property
    def device(self) -> torch.device:
        return self.shape.device

    def to(self, device: torch.device | str) -> ScanBuffer:
        """Move all tensors, in place."""
        for name, value in vars(self).items():
            moved = {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)
            setattr(self, name, moved)
        return self

    def crops(
        self, index: Tensor, matrix: Tensor, size: Sequence[int], mirror: bool = False, on_grid: bool = False
    ) -> dict[str, Tensor]:
        """One crop of each scan of ``index``.

        Args:
            index: numbers of scans, ``(B,)``.
            matrix: from voxels of the crops to voxels of the scans, ``(B, 3, 4)``, see :class:`CropSampler`.
            size: sides of the crops, three numbers.
            mirror: beyond its ends a scan is mirrored, in place of air.
            on_grid: the crops lie on voxels of the scans, so nothing is interpolated.

        Returns:
            For each key crops ``(B, 1, *size)``: integers by the nearest voxel, all else interpolated, float32. Beside
            them ``affine`` (B, 4, 4), voxels to RAS mm, ``spacing`` (B, 3), mm, and the numbers of the scans, (B,).
        """
        where = (self.offset[index], self.shape[index], matrix, size)
        found = {
            key: resample(voxels, *where, nearest=on_grid or not voxels.is_floating_point(), mirror=mirror)[:, None]
            for key, voxels in self.voxels.items()
        }
        found = {key: crop.float() if crop.is_floating_point() else crop for key, crop in found.items()}
        found |= {name: values[index] for name, values in self.numbers.items()}
        last = self.affine.new_zeros(len(index), 1, 4)
        last[:, :, 3] = 1
        affine = self.affine[index] @ torch.cat([matrix, last], dim=1)
        return {**found, "affine": affine, "spacing": affine[:, :3, :3].square().sum(dim=1).sqrt()}


class DeviceLoader(Randomizable):
    """Batches of random crops for MONAI's trainer, as ``train_data_loader``.

    The scans lie on the network's device, and a batch is drawn there: crops, labels and augmentation are a few launches
    for all samples together. Where the scans do not fit, they lie in the host's memory, or are read from the disk's
    cache, and a thread draws the next batches while the device computes.

    An epoch takes ``crops_per_scan`` crops of every scan, in random order; the last batch is filled up with crops of
    the epoch's first scans, so that all batches have one size. With several processes each draws its part of one
    global batch. What an epoch draws depends on its seed alone: see :class:`sspformer.engines.SeedEpoch`.

    Args:
        dataset: items with MetaTensors ``(1, X, Y, Z)`` at ``keys``, preprocessed, without random transforms.
        crop: draws where the crops lie, for example :class:`sspformer.transforms.CropSampler`; any callable
            ``(shape, spacing, generator) -> matrix`` with sides ``size``.
        batch_size: crops in a batch of one process.
        device: of the network.
        crops_per_scan: crops of each scan in an epoch.
        keys: entries to crop; integers by the nearest voxel.
        augmentation: callables ``(batch, generator) -> batch`` that run on the whole batch, in this order.
        residence: where the scans lie: "device", "host" or "disk"; "auto": the first of these of whose free memory they
            take at most half.
        foreground: share of voxels above ``threshold`` that a crop is to have, 0 to 1; a place is drawn up to ``TRIES``
            times. Air is soon learnt.
        threshold: intensity above which a voxel is no air.
        num_workers: processes that preprocess the scans, before the first epoch.

    Raises:
        ValueError: if ``residence`` is unknown, a number is out of its range, or the dataset is empty.
    """

    #: every process draws the whole global batch: seeds must not depend on the process
    shared_draws = True

    def __init__(
        self,
        dataset: Dataset,
        crop: CropSampler,
        batch_size: int,
        device: torch.device | str = "cpu",
        crops_per_scan: int = 1,
        keys: Sequence[str] = ("image",),
        augmentation: Sequence[Callable[[dict, torch.Generator], dict]] = (),
        residence: str = "auto",
        foreground: float = 0.0,
        threshold: float = 0.1,
        num_workers: int = 0,
    ) -> None:
        if residence not in ("auto", *RESIDENCES):
            raise ValueError(f"residence must be auto, {', '.join(RESIDENCES)}, got {residence!r}.")
        if min(batch_size, crops_per_scan) < 1:
            raise ValueError(f"batch_size and crops_per_scan must be 1 or more, got {batch_size} and {crops_per_scan}.")
        if not 0 <= foreground <= 1:
            raise ValueError(f"foreground must be between 0 and 1, got {foreground}.")
        if not len(dataset):
            raise ValueError("there is no scan to take crops of.")
        self.dataset, self.crop, self.batch_size, self.device = dataset, crop, batch_size, torch.device(device)
        self.crops_per_scan, self.keys, self.augmentation = crops_per_scan, tuple(keys), tuple(augmentation)
        self.residence, self.num_workers = residence, num_workers
        self.foreground, self.threshold = foreground, threshold
        self._buffer: ScanBuffer | None = None
        self.set_random_state(0)

    def set_random_state(self, seed=None, state=None) -> DeviceLoader:
        """As in MONAI's ``Randomizable``; the draws on the device start again, too."""
        super().set_random_state(seed, state)
        self._seed = int(self.R.randint(2**31))
        for transform in self.augmentation:
            if isinstance(transform, Randomizable):
                transform.set_random_state(None if seed is None else seed + idist.get_rank(), state)
        return self

    def __len__(self) -> int:
        return -(-len(self.dataset) * self.crops_per_scan // (self.batch_size * idist.get_world_size()))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.prepare()
        where = self.device if self.residence == "device" else torch.device("cpu")
        # all processes draw the places of the global batch; each augments its own part
        generators = [torch.Generator(where).manual_seed(self._seed ^ n) for n in (PLACES, idist.get_rank() + 1)]
        n_global = self.batch_size * idist.get_world_size()
        n_crops = len(self) * n_global
        order = self.R.permutation(len(self.dataset) * self.crops_per_scan)[:n_crops] % len(self.dataset)
        order = torch.from_numpy(order).long()
        order = order.repeat(-(-n_crops // len(order)))[:n_crops].reshape(-1, n_global)
        if self.residence == "device":
            yield from (self.draw(self._buffer, index, *generators) for index in order.to(where))
            return
        with ThreadPoolExecutor(1) as thread:  # one, so that the batches keep the generator's order
            ahead = deque(thread.submit(self._draw_on_host, index, *generators) for index in order[:PREFETCH])
            for index in itertools.chain(order[PREFETCH:], [None] * min(PREFETCH, len(order))):
                batch = ahead.popleft().result()
                if index is not None:
                    ahead.append(thread.submit(self._draw_on_host, index, *generators))
                yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def prepare(self) -> None:
        """Read all scans, and choose where they lie; called by the first epoch."""
        if self._buffer is not None or self.residence == "disk":
            return
        workers = {"num_workers": self.num_workers, "batch_size": None, "collate_fn": _unchanged}
        items, needed, room = [], 0.0, {"device": _free(self.device), "host": _free(torch.device("cpu"))}
        for item in tqdm(DataLoader(self.dataset, **workers), "reading scans", disable=None):
            items.append({key: item[key].clone() for key in self.keys} | {key: item[key] for key in _numbers([item])})
            needed += sum(item[key].nbytes for key in self.keys)
            expected = needed / len(items) * len(self.dataset)
            probed = len(items) >= min(PROBED, len(self.dataset))
            if self.residence == "auto" and probed and expected > MEMORY_SHARE * max(room.values()):
                self.residence = "disk"
                logger.info(f"{len(self.dataset)} scans need about {expected / 2**30:.3g} GiB: read for each crop")
                return
        if self.residence == "auto":
            self.residence = "device" if needed <= MEMORY_SHARE * room["device"] else "host"
        self._buffer = ScanBuffer(items, self.keys)
        if self.residence == "device":
            self._buffer.to(self.device)
        where = self.device if self.residence == "device" else "the host"
        logger.info(f"{len(items)} scans lie on {where}: {self._buffer.nbytes / 2**30:.3g} GiB")

    def draw(
        self, buffer: ScanBuffer, index: Tensor, generator: torch.Generator, own_generator: torch.Generator
    ) -> dict[str, Tensor]:
        """This process's part of a batch.

        Args:
            buffer: of the scans.
            index: numbers of the scans of the whole global batch.
            generator: of the places of all crops, on their device.
            own_generator: of the augmentation of this process's crops, there too.

        Returns:
            crops ``(B, 1, *crop_size)``, ``affine`` (B, 4, 4) and ``spacing`` (B, len(crop_size)), augmented.
        """
        matrix = self.place(buffer, index, generator)
        first = idist.get_rank() * self.batch_size
        own = slice(first, first + self.batch_size)
        batch = buffer.crops(index[own], matrix[own], self.crop.size, self.crop.mirror, self.crop.on_grid)
        if self.crop.spatial_dims == 2:
            batch |= {key: batch[key][..., 0] for key in self.keys} | {"spacing": batch["spacing"][:, :2]}
        for transform in self.augmentation:
            batch = transform(batch, own_generator)
        return batch

    def place(self, buffer: ScanBuffer, index: Tensor, generator: torch.Generator) -> Tensor:
        """Matrices of the crops ``(B, 3, 4)``: of ``TRIES`` draws the first with foreground enough, else the last."""
        if self.foreground == 0:
            return self.crop(buffer.shape[index], buffer.spacing[index], generator)
        tries = index.repeat(TRIES)
        matrix = self.crop(buffer.shape[tries], buffer.spacing[tries], generator)
        coarse = torch.cat([matrix[:, :, :3] * COARSE, matrix[:, :, 3:]], dim=2)
        size = [-(-side // COARSE) for side in self.crop.size]
        seen = resample(buffer.voxels[self.keys[0]], buffer.offset[tries], buffer.shape[tries], coarse, size)
        share = (seen > self.threshold).flatten(1).float().mean(dim=1)
        enough = (share >= self.foreground).reshape(TRIES, -1)
        enough[-1] = True
        chosen = enough.to(torch.uint8).argmax(dim=0)
        return matrix.reshape(TRIES, -1, 3, 4)[chosen, torch.arange(len(index), device=index.device)]

    def _draw_on_host(self, index: Tensor, *generators: torch.Generator) -> dict[str, Tensor]:
        buffer = self._buffer
        if buffer is None:  # a buffer of this batch alone
            scans, index = index.unique(return_inverse=True)
            buffer = ScanBuffer([self.dataset[int(scan)] for scan in scans], self.keys)
        batch = self.draw(buffer, index, *generators)
        return {n: v.pin_memory() for n, v in batch.items()} if self.device.type == "cuda" else batch


def _numbers(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the entries that are a number in every item."""
    return [name for name in items[0] if all(isinstance(item.get(name), Real) for item in items)]


def _unchanged(item: Any) -> Any:
    return item


def _free(device: torch.device) -> float:
    """Free bytes of a device's memory; infinite where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
