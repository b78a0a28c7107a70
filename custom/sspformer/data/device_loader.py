"""Batches of random crops, drawn where the network is: all scans lie on its device, and no worker cuts crops."""

from __future__ import annotations

import itertools
import logging
import math
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
#: share of the free memory that scans may take; of a GPU's, where a run goes on that had them there
MEMORY_SHARE, RESUMED_SHARE = 0.5, 0.8
#: scans after which it is judged whether all of them will fit
PROBED = 8
#: room that is made for scans that are still to be read, over what those before them lead to expect
SPARE = 1.05
#: places that are drawn for a crop which is to have foreground, and the stride at which its voxels are looked at
TRIES, COARSE = 8, 4
#: sets the draws of places apart from those of masks and noise, whose seed is the same
PLACES = 0x5CA1AB1E
#: labelled voxels of a scan that crops are drawn around
LABELLED = 1024
#: batches that are drawn ahead where the scans do not lie on the network's device
PREFETCH = 2


class ScanBuffer:
    """Scans of any shapes, and their label maps, one after the other in one flat tensor a key.

    Args:
        items: see :meth:`add`.
        keys: entries to keep.
        n_scans: how many there will be with those that are added later, at most; 0: none are.
        label_key: entry whose labelled voxels are listed, see :func:`labelled_voxels`; None: no list.

    Attributes:
        labelled: int16, ``(n_scans, LABELLED, 3)``; empty without a ``label_key``.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]] = (),
        keys: Sequence[str] = ("image",),
        n_scans: int = 0,
        label_key: str | None = None,
    ) -> None:
        self.keys, self.n_scans, self.n_voxels = tuple(keys), n_scans or len(items), 0
        self.label_key = label_key
        self.labelled = torch.empty(self.n_scans if label_key else 0, LABELLED, 3, dtype=torch.int16)
        self._flat: dict[str, Tensor] = {}  # with room for scans to come
        self.numbers: dict[str, Tensor] = {}
        self.shape, self.offset = torch.empty(0, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        self.affine, self.spacing = torch.empty(0, 4, 4), torch.empty(0, 3)
        for item in items:
            self.add(item)

    def add(self, item: Mapping[str, Any]) -> None:
        """Copy one more scan to the end.

        Args:
            item: dictionary with MetaTensors ``(1, X, Y, Z)`` at the keys, all on one grid. Types are kept: float16 or
                uint8 save memory. Entries that are a number in every item, such as a target, are kept as well.

        Raises:
            ValueError: if the item has several channels, is not 3D, or its keys differ in shape.
        """
        first, shapes = item[self.keys[0]], {tuple(item[key].shape) for key in self.keys}
        if len(shapes) > 1 or first.ndim != 4 or len(first) != 1:
            raise ValueError(
                f"scans on the device have one channel and three axes, the same for {', '.join(self.keys)}; got "
                f"{[tuple(item[key].shape) for key in self.keys]} of {first.meta.get('filename_or_obj', 'one')}."
            )
        end = self.n_voxels + first.numel()
        for key in self.keys:
            scan = torch.as_tensor(item[key]).as_subclass(Tensor)
            self._flat[key] = self._with_room(self._flat.get(key, scan.new_empty(0)), end, scan.dtype)
            self._flat[key][self.n_voxels : end] = scan.flatten()
        affine = torch.as_tensor(first.affine, dtype=torch.float32).cpu()
        numbers = {
            name: item[name] for name in (self.numbers if len(self) else item) if isinstance(item.get(name), Real)
        }
        self.numbers = {name: self._longer(self.numbers.get(name), value) for name, value in numbers.items()}
        if self.label_key:
            label = torch.as_tensor(item[self.label_key]).as_subclass(Tensor)[0]
            self.labelled[len(self)] = labelled_voxels(label, LABELLED)
        self.offset = self._longer(self.offset, self.n_voxels)
        self.shape = self._longer(self.shape, first.shape[1:])
        self.spacing = self._longer(self.spacing, affine[:3, :3].square().sum(dim=0).sqrt().tolist())
        self.affine = self._longer(self.affine, affine.tolist())
        self.n_voxels = end

    def _with_room(self, flat: Tensor, end: int, dtype: torch.dtype) -> Tensor:
        """``flat``, or a longer one with the same voxels, so that in the end about one copy of all scans is held."""
        dtype = torch.promote_types(flat.dtype, dtype)
        if end <= len(flat) and dtype == flat.dtype:
            return flat
        seen = len(self) + 1
        expected = self.n_scans if seen >= PROBED else min(self.n_scans, PROBED)
        grown = torch.empty(max(end, int(SPARE * end / seen * expected)), dtype=dtype, device=self.device)
        grown[: self.n_voxels] = flat[: self.n_voxels]
        return grown

    def _longer(self, rows: Tensor | None, row: Any) -> Tensor:
        new = torch.tensor([row], device=self.device)
        return new if rows is None else torch.cat([rows, new])

    def __len__(self) -> int:
        return len(self.shape)

    @property
    def voxels(self) -> dict[str, Tensor]:
        """All scans of each key, ``(n_voxels,)``."""
        return {key: flat[: self.n_voxels] for key, flat in self._flat.items()}

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
            if isinstance(value, dict):
                setattr(self, name, {key: tensor.to(device) for key, tensor in value.items()})
            elif isinstance(value, Tensor):
                setattr(self, name, value.to(device))
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


def labelled_voxels(label: Tensor, n: int) -> Tensor:
    """Voxels of a label map ``(X, Y, Z)`` that are not 0, as many of each class, at random and always the same.

    Returns:
        indices, ``(n, 3)``: -1 if there is no label, and some of them twice if there are few.

    Raises:
        ValueError: if the map does not hold integers.
    """
    if label.is_floating_point():
        raise ValueError(f"crops are drawn around labels only in maps of integers, got {label.dtype}.")
    found = label.flatten().nonzero()[:, 0]
    if not len(found):
        return torch.full((n, 3), -1)
    values, order = label.flatten()[found].sort(stable=True)
    counts = values.unique_consecutive(return_counts=True)[1]
    of_class = torch.arange(n) % len(counts)
    place = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = counts.cumsum(0)[of_class] - counts[of_class] + (place * counts[of_class]).long()
    return torch.stack(torch.unravel_index(found[order[at]], label.shape), dim=1)


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
        crop: draws where the crops lie, as :class:`sspformer.transforms.CropSampler` does: any callable
            ``(shape, spacing, generator) -> matrix``, with ``near`` if ``labelled``, that also has ``size`` (three
            sides), ``spatial_dims`` (2 for slices), and ``mirror`` and ``on_grid`` as in :meth:`ScanBuffer.crops`.
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
        labelled: share of the crops that are drawn around a labelled voxel, 0 to 1, each class of a scan as often as
            every other. Small structures would be in few of the crops; a third is usual, after nnU-Net (Isensee et
            al., doi 10.1038/s41592-020-01008-z).
        label_key: the entry with the labels.
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
        labelled: float = 0.0,
        label_key: str = "label",
        num_workers: int = 0,
    ) -> None:
        if residence not in ("auto", *RESIDENCES):
            raise ValueError(f"residence must be auto, {', '.join(RESIDENCES)}, got {residence!r}.")
        if min(batch_size, crops_per_scan) < 1:
            raise ValueError(f"batch_size and crops_per_scan must be 1 or more, got {batch_size} and {crops_per_scan}.")
        for name, share in (("foreground", foreground), ("labelled", labelled)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}.")
        if labelled and label_key not in keys:
            raise ValueError(f"labelled {labelled} needs labels, and {label_key} is not among the keys {list(keys)}.")
        if not len(dataset):
            raise ValueError("there is no scan to take crops of.")
        self.dataset, self.crop, self.batch_size, self.device = dataset, crop, batch_size, torch.device(device)
        self.crops_per_scan, self.keys, self.augmentation = crops_per_scan, tuple(keys), tuple(augmentation)
        self.residence, self.num_workers = residence, num_workers
        self.foreground, self.threshold, self.labelled = foreground, threshold, labelled
        self.label_key = label_key if labelled else None
        self._buffer: ScanBuffer | None = None
        self._drawn_on: str | None = None
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
        if self._drawn_on not in (None, where.type):
            logger.warning(
                f"until this run was stopped its crops were drawn on {self._drawn_on}, and now they are on "
                f"{where.type}: they are not those of a run that was not stopped. --device and --data_on_device decide."
            )
        self._drawn_on = where.type
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
        places = [self.residence] if self.residence != "auto" else list(RESIDENCES)
        free = {"device": _free(self.device), "host": _free(torch.device("cpu")), "disk": math.inf}
        free_on_host = {"device": RESUMED_SHARE * free["host"], "host": math.inf, "disk": math.inf}
        shares = dict.fromkeys(RESIDENCES, MEMORY_SHARE)
        if self._drawn_on == self.device.type != "cpu":
            shares["device"] = RESUMED_SHARE
        elif self._drawn_on == "cpu" != self.device.type and len(places) > 1:
            places.remove("device")
        buffer = ScanBuffer(keys=self.keys, n_scans=len(self.dataset), label_key=self.label_key)
        workers = {"num_workers": self.num_workers, "batch_size": None, "collate_fn": _unchanged}
        for item in tqdm(DataLoader(self.dataset, **workers), "reading scans", disable=None):
            buffer.add(item)
            expected = buffer.nbytes / len(buffer) * len(self.dataset)
            if len(places) > 1 and len(buffer) < min(PROBED, len(self.dataset)):
                continue  # on the host, until it is known what all of them need
            # they are read on the host, wherever they lie later
            while len(places) > 1 and expected > min(shares[places[0]] * free[places[0]], free_on_host[places[0]]):
                del places[0]
            if places[0] == "disk":
                break
        # where the process with the least room has them: all must draw the same places
        self.residence = RESIDENCES[int(idist.all_reduce(RESIDENCES.index(places[0]), "MAX"))]
        if self.residence == "disk":
            logger.info(f"{len(self.dataset)} scans need about {expected / 2**30:.3g} GiB: read for each crop")
            return
        self._buffer = buffer.to(self.device if self.residence == "device" else "cpu")
        where = self.device if self.residence == "device" else "the host"
        logger.info(f"{len(buffer)} scans lie on {where}: {buffer.nbytes / 2**30:.3g} GiB")

    def state_dict(self) -> dict[str, str | None]:
        """On which kind of device crops are drawn; other draws would come from another."""
        return {"drawn_on": self._drawn_on}

    def load_state_dict(self, state: Mapping[str, str | None]) -> None:
        """Of the run that goes on: "auto" draws its crops there again where it can; a warning says where it cannot."""
        self._drawn_on = state["drawn_on"]

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
        near = ()
        if self.labelled:
            which, chosen = torch.rand(2, len(index), generator=generator, device=index.device)
            voxel = buffer.labelled[index, (which * LABELLED).long()]
            near = (torch.where((chosen < self.labelled)[:, None] & (voxel >= 0), voxel, math.nan),)
        if self.foreground == 0:
            return self.crop(buffer.shape[index], buffer.spacing[index], generator, *near)
        tries = index.repeat(TRIES)
        near = (voxel.repeat(TRIES, 1) for voxel in near)
        matrix = self.crop(buffer.shape[tries], buffer.spacing[tries], generator, *near)
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
            buffer = ScanBuffer([self.dataset[int(scan)] for scan in scans], self.keys, label_key=self.label_key)
        batch = self.draw(buffer, index, *generators)
        return {n: v.pin_memory() for n, v in batch.items()} if self.device.type == "cuda" else batch


def _unchanged(item: Any) -> Any:
    return item


def _free(device: torch.device) -> float:
    """Free bytes of a device's memory; infinite where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
