"""Inference on scans as users have them: predictions go back to each file's own grid, one bad file stops nothing."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.data import Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.transforms import MapTransform, ResampleToMatch, SaveImaged, Spacingd
from monai.utils import ensure_tuple_rep, str2bool
from torch import Tensor

from .data.checking import digest, stats, write_atomically
from .data.naming import NIFTI_SUFFIX, stem
from .data.reading import files_of, is_series
from .files import replacing
from .visualize import restoration_panel, segmentation_panel

__all__ = [
    "POSTFIX",
    "AutocastSlidingWindowInferer",
    "InferenceDataset",
    "InferenceEvaluator",
    "InferenceReport",
    "InvertArgmaxd",
    "ResampleSpacingd",
    "SaveLikeInputd",
    "SavePictured",
    "StrictCheckpointLoader",
    "argmax_on_grid",
    "dicom_path",
    "output_path",
    "picture_path",
    "record_path",
    "save_like",
    "unfinished",
]

logger = logging.getLogger("sspformer")

#: what each task appends to the name of a scan
POSTFIX = {"segmentation": "seg", "denoising": "denoised", "super_resolution": "sr"}


class AutocastSlidingWindowInferer(SlidingWindowInferer):
    """MONAI's ``SlidingWindowInferer`` whose network runs under bfloat16 autocast, on CPU and GPU alike.

    Windows are blended in float32.

    Args:
        args: of ``SlidingWindowInferer``.
        enabled: False: run in the network's own precision.
        kwargs: of ``SlidingWindowInferer``.
    """

    def __init__(self, *args, enabled: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.enabled = str2bool(enabled)  # the command line gives "false" as a string

    def __call__(self, inputs: Tensor, network, *args, **kwargs):
        def in_autocast(*windows, **options) -> Tensor:
            with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.enabled):
                return network(*windows, **options).float()

        return super().__call__(inputs, in_autocast, *args, **kwargs)


class ResampleSpacingd(Spacingd):
    """MONAI's ``Spacingd`` that sees its own keys only.

    That of MONAI 1.6 updates every entry whose name starts with ``image_`` as if it were metadata, and fails on the
    path that MONAI Label keeps at ``image_path``.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        own = {key: data[key] for key in self.keys if key in data}
        return {**data, **super().__call__(own, lazy)}


class InvertArgmaxd(MapTransform):
    """Class scores on the network's grid become the label map on the grid that the file has, uint8.

    Scores are interpolated linearly and the largest wins, so borders are smooth where the file's grid is the finer one.
    MONAI's ``Invertd`` would hold all classes at the file's resolution before the argmax: 18 of a 1 mm head are 850 MB.
    The way back is read off the affines alone, so any preprocessing that keeps the affine is undone.

    Args:
        keys: scores ``(classes, *S)``.
        orig_keys: the preprocessed image ``(C, *S)`` of each key, a MetaTensor with ``original_affine`` and
            ``spatial_shape`` of its file.
        allow_missing_keys: do not raise if a key is missing.
    """

    def __init__(
        self, keys: KeysCollection = "pred", orig_keys: KeysCollection = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.orig_keys = ensure_tuple_rep(orig_keys, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key, orig_key in self.key_iterator(d, self.orig_keys):
            image = d[orig_key]
            affine, shape = image.meta["original_affine"], image.meta["spatial_shape"]
            scores = torch.as_tensor(d[key]).as_subclass(Tensor)
            labels = argmax_on_grid(scores, image.affine, [int(side) for side in shape], affine)
            meta = {name: value for name, value in image.meta.items() if name != "affine"} | {"n_classes": len(scores)}
            d[key] = MetaTensor(labels[None], affine=torch.as_tensor(affine, dtype=torch.float64), meta=meta)
        return d


def argmax_on_grid(
    scores: Tensor,
    affine: Tensor | np.ndarray,
    shape: Sequence[int],
    target_affine: Tensor | np.ndarray,
    slab_voxels: int = 2**22,
) -> Tensor:
    """The class with the largest score, linearly interpolated, at each voxel of another grid.

    Args:
        scores: ``(classes, X, Y, Z)``, at most 256 classes. Beyond the outermost voxels the scores are theirs.
        affine: of the scores, voxels to mm, ``(4, 4)``.
        shape: of the other grid, three sides.
        target_affine: of the other grid, voxels to mm, ``(4, 4)``.
        slab_voxels: scores that are interpolated at a time; the other grid is filled slab by slab.

    Returns:
        uint8 of the given shape, on the device of the scores.
    """
    to_scores = np.linalg.solve(np.asarray(affine, float), np.asarray(target_affine, float))[:3]
    labels = torch.empty(tuple(shape), dtype=torch.uint8, device=scores.device)
    step = max(1, slab_voxels // (scores.shape[0] * shape[1] * shape[2]))
    axes = np.abs(to_scores[:, :3]).argmax(axis=0)  # of the scores, along each axis of the grid
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
    """Slabs of a grid whose axes are those of the scores: matrix products, faster than ``grid_sample``."""
    scores = scores.permute(0, *(1 + axes))
    weights = []
    for i, (axis, n, side) in enumerate(zip(axes, shape, scores.shape[1:], strict=True)):
        at = (to_scores[axis, i] * np.arange(n) + to_scores[axis, 3]).clip(0, side - 1)
        weights.append((1 - np.abs(at[:, None] - np.arange(side))).clip(0))  # of each score in each voxel
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
    """Slabs of any grid."""
    sides = torch.tensor(scores.shape[1:], dtype=torch.float64)
    # grid_sample counts from -1 to 1, x last
    to_unit = (2 / (sides - 1).clamp(min=1))[:, None] * torch.from_numpy(to_scores)
    to_unit[:, 3] -= 1
    to_unit = to_unit.flip(0).to(scores.device, torch.float32)
    j, k = torch.meshgrid(*(torch.arange(n, device=scores.device) for n in shape[1:]), indexing="ij")
    in_slice = j[..., None] * to_unit[:, 1] + k[..., None] * to_unit[:, 2] + to_unit[:, 3]  # Y Z 3
    for i in torch.arange(shape[0], device=scores.device).split(step):
        points = in_slice + i[:, None, None, None] * to_unit[:, 0]
        yield i, F.grid_sample(scores[None], points[None], padding_mode="border", align_corners=True)[0]


class SaveLikeInputd(SaveImaged):
    """Writes predictions as NIfTI with the conventions of the file that was read, see :func:`save_like`.

    MONAI's ``SaveImaged`` is what MONAI Label looks for and leaves out; its own writer makes a new header, does not
    round, names a DICOM series after its first slice, and leaves half a file when it is killed.

    Args:
        keys: predictions ``(1, X, Y, Z)``, MetaTensors with ``filename_or_obj`` of the file that was read.
        output_dir: gets ``<name>_<output_postfix>.nii.gz``, with the item's own ``name``.
        output_postfix: see above.
        rounded: False: images are float32 whatever type the file has.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, output_postfix: str = "seg", rounded: bool = True
    ) -> None:
        super().__init__(keys, output_dir=output_dir, output_postfix=output_postfix)
        self.output_dir, self.output_postfix, self.rounded = output_dir, output_postfix, rounded

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            save_like(d[key], output_path(d["name"], self.output_dir, self.output_postfix), self.rounded)
        return d


def save_like(volume: MetaTensor, path: str | Path, rounded: bool = True) -> None:
    """Write a volume as NIfTI beside its final name, then rename it: a kill leaves no half file.

    On the grid of the file that was read (``filename_or_obj``), its affine is kept bit by bit, with qform, sform and
    their codes; on another grid, both are brought to it. From DICOM, qform and sform say scanner coordinates. A label
    map (integers) is written as it is; an image takes the file's type if that is integer without a scale factor, and
    is rounded and clipped to it; else it is float32.

    Args:
        volume: ``(1, X, Y, Z)`` with affine to RAS mm.
        path: ends in ``.nii.gz``.
        rounded: False: every image is float32.
    """
    path, source = Path(path), str(volume.meta["filename_or_obj"])
    voxels = volume.as_tensor().detach().cpu().numpy()[0]
    affine = np.asarray(volume.affine.cpu(), dtype=np.float64)
    if is_image := voxels.dtype.kind == "f":
        voxels = voxels.astype(np.float32, copy=False)
    if NIFTI_SUFFIX.search(source):
        of_source = nib.load(source)
        header = of_source.header
        stored = header.get_data_dtype()
        unscaled = (of_source.dataobj.slope, of_source.dataobj.inter) == (1, 0)
        if is_image and rounded and unscaled and stored.kind in "iu":
            voxels = _rounded(voxels, stored)
        image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        header = image_class.header_class.from_header(header)
        header.extensions.clear()  # they may hold a whole DICOM header, with the patient's name
        header["cal_min"] = header["cal_max"] = 0  # display range of the input's intensities
        header.set_data_dtype(voxels.dtype)
        step = np.linalg.solve(of_source.affine, affine)  # voxels of the new grid to those of the file
        if voxels.shape == of_source.shape[:3] and np.allclose(step, np.eye(4), atol=1e-4):
            image = image_class(voxels, of_source.affine, header)
        else:
            image = image_class(voxels, affine, header)
            qform, sform = int(header["qform_code"]), int(header["sform_code"])
            image.set_qform(header.get_qform() @ step if qform else affine, qform)
            image.set_sform(header.get_sform() @ step if sform else affine, sform or (0 if qform else "aligned"))
    else:
        image = nib.Nifti1Image(voxels, affine)
        image.set_qform(affine, "scanner")
        image.set_sform(affine, "scanner")
        image.header.set_xyzt_units("mm")

    with replacing(path) as part, gzip.open(part, "wb", compresslevel=1) as file:
        image.to_stream(file)


def _rounded(voxels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Nearest integers that the type can hold."""
    limits = np.iinfo(dtype)
    if dtype.itemsize > 2:
        voxels = voxels.astype(np.float64)  # float32 cannot hold the limits
    return np.clip(np.rint(voxels), limits.min, limits.max).astype(dtype)


class SavePictured(MapTransform):
    """A PNG a scan: labels over the scan, or before and after; last of the postprocessing, when the result is written.

    One that cannot be drawn is a warning.

    Args:
        keys: the prediction as it was written, one key.
        output_dir: gets ``pictures/<name>_<postfix of the task>.png``.
        task: "segmentation", "denoising" or "super_resolution".
        class_names: of the structures without the background. None, or names that are not as many as the network's
            classes: their numbers are shown.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, task: str, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__(keys)
        self.output_dir, self.task, self.class_names = output_dir, task, class_names

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            try:
                self.draw(data["image"], data[key], data["name"])
            except Exception as error:  # the result is there, and counts
                logger.warning(f"no picture of {data['name']}: {_reason(error)}")
        return dict(data)

    def draw(self, image: MetaTensor, pred: MetaTensor, name: str) -> None:
        """Draws one scan, the image on the network's grid and the prediction on the file's."""
        if self.task == "segmentation":
            names = self.class_names if len(self.class_names or ()) + 1 == pred.meta.get("n_classes") else None
            image = ResampleToMatch(mode="bilinear", padding_mode="border")(image, pred)
            figure = segmentation_panel([{"image": image, "pred": pred, "name": name}], names)
        else:
            figure = restoration_panel([{"image": image, "pred": pred, "name": name}])
        path = picture_path(name, self.output_dir, POSTFIX[self.task])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)


def output_path(name: str, output_dir: str | Path, postfix: str) -> Path:
    """Where the prediction for the item of this name goes."""
    return Path(output_dir) / f"{name}_{postfix}.nii.gz"


def picture_path(name: str, output_dir: str | Path, postfix: str) -> Path:
    """Where the picture of that prediction goes."""
    return Path(output_dir) / "pictures" / f"{name}_{postfix}.png"


def dicom_path(name: str, output_dir: str | Path, postfix: str) -> Path:
    """Where that prediction goes as DICOM: a file for a segmentation, a folder of slices for an image."""
    return Path(output_dir) / f"{name}_{postfix}{'.dcm' if postfix == POSTFIX['segmentation'] else ''}"


def record_path(name: str, output_dir: str | Path, postfix: str) -> Path:
    """Where it is written what that prediction was made from, see :func:`unfinished`."""
    return Path(output_dir) / f"{name}_{postfix}.json"


def unfinished(
    inputs: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    postfix: str,
    weights: str | Path,
    options: Mapping[str, Any],
    pictures: bool = False,
    overwrite: bool = False,
    dicom: bool = False,
) -> list[Mapping[str, Any]]:
    """The items, of which some are done already, so that an interrupted batch goes on where it stopped.

    An output counts as done if the record beside it says that it was made from the same file, weights and options.

    Args:
        inputs: items of :func:`sspformer.data.find_inputs`.
        output_dir: of the outputs.
        postfix: of the outputs.
        weights: file of the network's weights.
        options: whatever else shapes an output; compared as text.
        pictures: each output needs a picture as well.
        overwrite: all are to do.
        dicom: each output of a DICOM series needs a DICOM one as well.

    Returns:
        the items: with ``done``; or, still to do, with their ``record`` (JSON); or with a ``reason`` if another scan's
        output has their name, or one beside which there is a JSON file but no record.
    """
    pictures, overwrite, dicom = map(str2bool, (pictures, overwrite, dicom))  # strings from the command line
    items = []
    for item in inputs:
        if item.get("reason"):
            items.append(item)
            continue
        record = _record(item["image"], weights, options)
        where = (item["name"], output_dir, postfix)
        output, before = output_path(*where), record_path(*where)
        beside = [picture_path(*where)] if pictures else []
        beside += [dicom_path(*where)] if dicom and is_series(item["image"]) else []
        written = before.read_text(errors="replace") if output.is_file() and before.is_file() else ""
        source = _source(written)
        if overwrite or not written or source == _source(record):
            to_do = overwrite or written != record or not all(_is_newer(path, output) for path in beside)
            items.append({**item, **({"record": record} if to_do else {"done": True})})
        else:
            made = f"made from {source}" if source else f"and {before.name} beside it does not say what from"
            reason = f"{output} is there already, {made}: give another output_dir, or replace it with --overwrite true"
            items.append({"name": item["name"], "source": item.get("source", ""), "reason": reason})
    return items


def _source(record: str) -> str:
    """What a record says that an output was made from; empty if it is none of ours."""
    try:
        return str(json.loads(record)["source"])
    except (ValueError, TypeError, KeyError):
        return ""


def _is_newer(path: Path, output: Path) -> bool:
    """Whether what goes beside an output is there, and of this output."""
    return path.exists() and path.stat().st_mtime_ns >= output.stat().st_mtime_ns


def _record(image: str | Sequence[str], weights: str | Path, options: Mapping[str, Any]) -> str:
    """What an output is made from, as JSON; a series is named by its folder."""
    files = [file.absolute() for file in files_of(image)]
    pair = [file.with_suffix(".img") for file in files if file.suffix.lower() == ".hdr"]
    model = Path(weights).absolute()
    record = {
        "source": str(files[0].parent if is_series(image) else files[0]),
        "source_version": digest(stats(files + pair)),
        "weights": str(model),
        "weights_version": digest(stats([model] if model.is_file() else [])),
        "options": {name: str(value).lower() for name, value in options.items()},
    }
    return json.dumps(record, indent=1) + "\n"


class InferenceDataset(Dataset):
    """MONAI's ``Dataset`` that gives the reason in place of a scan that cannot be read or preprocessed.

    Items are those of :func:`sspformer.data.find_inputs`; one with a ``reason`` keeps it, one of a DICOM series keeps
    its ``files``. Those that are ``done`` are left out, and are in ``items`` alone. A client's own list may be of
    ``{"image": path}``: then names are those of the files.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable | None = None) -> None:
        names = [item.get("name") or stem(files_of(item["image"])[0].name) for item in data]
        count = Counter(names)
        names = [name if count[name] == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]
        self.items = [{**item, "name": name} for item, name in zip(data, names)]
        super().__init__([item for item in self.items if not item.get("done")], transform)

    def _transform(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        reason = item.get("reason")
        if not reason:
            try:
                files = {"files": list(item["image"])} if is_series(item["image"]) else {}
                return {**super()._transform(index), **files}
            except Exception as error:  # whatever is wrong with this scan, the others do not suffer
                reason = _reason(error)
        return {"name": item["name"], "reason": reason}


class InferenceEvaluator(SupervisedEvaluator):
    """MONAI's ``SupervisedEvaluator`` that goes on after a scan that fails.

    The output of such a scan is ``{"reason": ...}``. Batches hold one scan each.
    """

    def run(self) -> None:
        if len(self.data_loader):  # of an empty one MONAI warns, but here it is a batch that is complete
            super().run()

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> Any:
        if "reason" in batchdata:
            return {"reason": batchdata["reason"][0]}
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:  # out of memory, disk full, ...
            return {"reason": _reason(error)}


def _reason(error: BaseException) -> str:
    """The message of an exception, without what MONAI's transforms wrap around it."""
    while str(error).startswith("applying transform") and error.__cause__ is not None:
        error = error.__cause__
    return f"{error}" or type(error).__name__


class InferenceReport:
    """Writes ``inference.csv``, a row a scan: name, status (written, already there, failed), seconds, reason, source;
    and beside each output the record of what it was made from, see :func:`unfinished`. For an evaluator of an
    :class:`InferenceDataset`.

    Args:
        output_dir: of the outputs and the report.
        postfix: of the outputs.
    """

    COLUMNS = ("name", "status", "seconds", "reason", "source")

    def __init__(self, output_dir: str | Path, postfix: str) -> None:
        self.sources: dict[str, str] = {}
        self.path, self.postfix = Path(output_dir) / "inference.csv", postfix
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        dataset = engine.data_loader.dataset
        self.sources = {item["name"]: str(item.get("source", "")) for item in dataset.items}
        engine.add_event_handler(Events.STARTED, self.start, dataset.data)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.start_clock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.count)

    def start(self, engine: Engine, to_do: Sequence[Mapping[str, Any]]) -> None:
        names = {item["name"] for item in to_do}
        self.records = {item["name"]: item["record"] for item in to_do if "record" in item}
        for item in to_do:  # the record of before must not vouch for what is written from now on
            if not item.get("reason"):
                record_path(item["name"], self.path.parent, self.postfix).unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writeheader()
        for name in self.sources:
            if name not in names:
                self.add(name, "already there")

    def start_clock(self, engine: Engine) -> None:
        self.clock = time.perf_counter()

    def __call__(self, engine: Engine) -> None:
        batch, output = engine.state.batch, engine.state.output
        name = batch[0]["name"] if isinstance(batch, list) else batch["name"][0]
        reason = output.get("reason", "") if isinstance(output, Mapping) else ""
        if reason:
            logger.warning(f"{self.sources.get(name) or name} failed: {reason}")
        elif name in self.records:
            write_atomically(record_path(name, self.path.parent, self.postfix), self.records[name])
        self.add(name, "failed" if reason else "written", round(time.perf_counter() - self.clock, 2), reason)

    def add(self, name: str, status: str, seconds: float | str = "", reason: str = "") -> None:
        values = (name, status, seconds, reason, self.sources.get(name, ""))
        self.rows.append(dict(zip(self.COLUMNS, values)))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow(self.rows[-1])

    def count(self, engine: Engine) -> None:
        """Numbers of scans, and seconds, as the engine's metrics: what ``--tracking mlflow`` logs."""
        for status in ("written", "failed"):
            engine.state.metrics[status] = sum(row["status"] == status for row in self.rows)
        engine.state.metrics["seconds"] = sum(row["seconds"] or 0 for row in self.rows)

    def finish(self) -> None:
        """Sum up; ends the program with status 1 and the list of the scans that failed, if any did."""
        count = {status: sum(row["status"] == status for row in self.rows) for status in ("written", "already there")}
        count["already there"] += 0 if self.rows else len(self.sources)  # nothing was left to do, so nothing ran
        again = " (--overwrite true writes them again)" if count["already there"] else ""
        logger.info(
            f"{count['written']} scans written to {self.path.parent}, {count['already there']} already there{again}"
        )
        failed = [row for row in self.rows if row["status"] == "failed"]
        if failed:
            lines = [f"  {row['source'] or row['name']}: {row['reason']}" for row in failed]
            raise SystemExit("\n".join([f"{len(failed)} of {len(self.sources)} scans failed:", *lines]))


class StrictCheckpointLoader:
    """Loads a network's weights before the first batch: MONAI's ``CheckpointLoader`` with errors that say what to do.

    By "CheckpointLoader" in its name MONAI's ``MonaiAlgo`` knows it, and disables it, as it brings weights of its own.

    Args:
        network: to load into.
        path: of its state dict, or of a checkpoint with it as ``"network"``, of any floating point type; read with
            ``weights_only``.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if it does not hold exactly the network's tensors, naming those that differ, or one is not finite.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path) -> None:
        self.network, self.path = network, path

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        if not Path(self.path).is_file():
            raise FileNotFoundError(
                f"no weights at {self.path}: train the model first (configs/train.json writes models/model.pt in its "
                "output_dir), or name a file with --weights."
            )
        try:
            source = torch.load(self.path, map_location="cpu", weights_only=True)
            source = source["network"] if isinstance(source.get("network"), dict) else source
            shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        except Exception as error:  # torch raises many types here: pickle's, zip's, RuntimeError, EOFError
            raise ValueError(
                f"{self.path} is damaged or no plain state dict ({type(error).__name__}): copy it again, or write it "
                "with torch.save(network.state_dict(), path)."
            ) from None
        if broken := [name for name, tensor in source.items() if not tensor.isfinite().all()]:
            raise ValueError(
                f"the weights {self.path} are NaN or infinite in {len(broken)} tensors, such as {broken[0]}: the "
                "training that wrote them has diverged, give those of before with --weights."
            )
        network = getattr(self.network, "module", self.network)
        try:
            network.load_state_dict(source)
        except RuntimeError as error:
            wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
            odd = [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]
            if not odd:  # all shapes fit
                raise ValueError(f"the weights {self.path} are of another model: {error}") from None
            if set(odd) == {"head.weight", "head.bias"} and set(odd) <= wanted.keys() & shapes.keys():
                channels = shapes["head.weight"][0]
                raise ValueError(
                    f"the weights {self.path} have {channels} output channels, the network {wanted['head.weight'][0]}: "
                    f"add --network_def#out_channels {channels} and --class_names with the names of the {channels - 1} "
                    "labels, or the overlay that they were trained with."
                ) from None
            differ = [
                f"{name} is {shapes.get(name, 'missing')} in the file and {wanted.get(name, 'missing')} in the network"
                for name in odd
            ]
            more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise ValueError(
                f"the weights {self.path} are of another model: {'; '.join(differ[:3])}{more}. Add the overlay that "
                "they were trained with (--config_file \"['configs/inference.json','configs/denoising.json']\"), or "
                "give others with --weights."
            ) from None
        logger.info(f"weights from {self.path}")
