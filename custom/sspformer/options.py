"""The options of the configs: what each takes, and what it does.

``SCHEMA`` has the options that users set. :func:`sspformer.engines.check_options` checks a run against it, and
``scripts/options_page.py`` makes the tables of docs/options.md from it. Defaults are in the configs alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from monai.utils import str2bool

__all__ = ["SCHEMA", "Option", "flag", "is_null"]


def flag(value) -> bool:
    """Whether an option is on: a bool, or one of the words that MONAI takes for it (true, yes, 1, ...).

    Raises:
        ValueError: for any other word.
    """
    return str2bool(str(value).strip())


def is_null(value) -> bool:
    """Whether an option is off: None, or one of the words that a command line has for it."""
    return value is None or str(value).strip().lower() in ("", "none", "null", "false")


# --- what an option may take


class Takes(NamedTuple):
    """What an option takes.

    Attributes:
        text: in words, of Markdown.
        read: returns a value in the form that the configs use, or raises.
        is_text: whether a number is taken as the text that was typed, as of a folder 2024.
    """

    text: str
    read: Callable[[Any], Any]
    is_text: bool = False

    def of(self, name: str, value: Any) -> Any:
        """The value of an option in the form that the configs use.

        Raises:
            ValueError: with the name, the value and what the option takes.
        """
        try:
            return self.read(value)
        except (TypeError, ValueError, OverflowError, RuntimeError, re.error):
            raise ValueError(f"{name} takes {self.text.replace('`', '')}, not {value!r}.") from None


def _read_number(value: Any, kind: type, low: float, high: float, bounds: str) -> float:
    if isinstance(value, str):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError
    if kind is int and not isinstance(value, Integral):
        value = int(value) if value == int(value) else math.nan
    over = value > low if bounds[0] == "(" else value >= low
    under = value < high if bounds[1] == ")" else value <= high
    if not (over and under):
        raise ValueError
    return value


def _number(interval: str, kind: type = float) -> Takes:
    """A finite number in an interval such as "[0, 1)", with "inf" for no bound."""
    low, high = map(float, interval[1:-1].split(","))
    noun = "integer" if kind is int else "number"
    if high < math.inf:
        where = f" in {interval}"
    elif low > -math.inf:
        where = f" above {low:g}" if interval[0] == "(" else f" of at least {low:g}"
    else:
        where = ""
    article = "an" if kind is int else "a"
    bounds = interval[0] + interval[-1]
    return Takes(f"{article} {noun}{where}", lambda value: _read_number(value, kind, low, high, bounds))


def integer(interval: str) -> Takes:
    """An integer in an interval such as "[1, inf)"."""
    return _number(interval, int)


def _list(takes: Takes, *lengths: int, ascending: bool = False) -> Takes:
    """A list of so many numbers."""
    noun = re.sub(r"^an? (\w+)", r"\1s", takes.text)

    def read(value: Any) -> list:
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) not in lengths:
            raise ValueError
        numbers = [takes.read(number) for number in value]
        if ascending and numbers != sorted(numbers):
            raise ValueError
        return numbers

    return Takes(f"{' or '.join(map(str, lengths))} {noun}{', ascending' if ascending else ''}", read)


def _listed(texts: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def either(*kinds: Takes) -> Takes:
    """What the first of these reads that can."""

    def read(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except (TypeError, ValueError, OverflowError):
                continue
        raise ValueError

    return Takes(_listed([kind.text for kind in kinds]), read, any(kind.is_text for kind in kinds))


def _range(interval: str) -> Takes:
    return either(_number(interval), _list(_number(interval), 2, ascending=True))


def _words(*words: str) -> Takes:
    """One of some words, in lower or upper case."""

    def read(value: Any) -> str:
        return words[words.index(str(value).strip().lower())]

    return Takes(_listed([f"`{word}`" for word in words]), read)


def _nothing(value: Any, *words: str) -> None:
    if not is_null(value) and str(value).strip().lower() not in words:
        raise ValueError


NULL = Takes("`null`", _nothing)
ALL = Takes("`all`", lambda value: _nothing(value, "all"))
FLAG = Takes("true or false", flag)


def _read_text(value: Any, pattern: str = r"(?s).*\S.*") -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, (str, Real)) or not re.fullmatch(pattern, str(value)):
        raise ValueError
    return str(value)


PATH = Takes("a path", _read_text, True)
TEXT = Takes("a text", _read_text, True)
NAME = Takes("letters, digits, `_`, `-` and `.`", lambda value: _read_text(value, r"[\w.-]*[\w-][\w.-]*"), True)
PATTERN = Takes("a regular expression", lambda value: re.compile(_read_text(value)).pattern, True)


def _read_names(value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError
    return [_read_text(name) for name in value]


def _read_suffixes(value: Any) -> tuple[str, ...] | str:
    suffixes = re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else list(value)
    if not suffixes or not all(re.fullmatch(r"[A-Za-z0-9]+", str(suffix)) for suffix in suffixes):
        raise ValueError
    return "all" if suffixes == ["all"] else tuple(map(str, suffixes))


def _read_device(value: Any) -> Any:
    device = torch.device(value)
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, math.inf):
        raise ValueError
    return value


def _read_component(value: Any) -> Any:
    if isinstance(value, (str, bytes, Real, list, tuple)):
        raise ValueError
    return value


NAMES = Takes("a list of names", _read_names)
SUFFIXES = Takes("`all` or BIDS suffixes", _read_suffixes)
DEVICE = Takes("`cpu`, or a device that PyTorch finds: `cuda`, `cuda:1`, ... or `mps`", _read_device)
COMPONENT = Takes("parts of its own, set with `#`", _read_component)
SHARE = _number("[0, 1]")
PER_AXIS = _list(_number("(0, inf)"), 3)
SIDES = integer("[1, 4096]")


class Option(NamedTuple):
    """A row of ``SCHEMA``.

    Attributes:
        section: of the page of options: the workflow that has it.
        takes: what it takes.
        text: what it does, in a sentence; of Markdown.
    """

    section: str
    takes: Takes
    text: str


SCHEMA: dict[str, Option] = {
    name: Option(section, takes, text)
    for section, rows in {
        "All workflows": {
            "bundle_root": (PATH, "folder of the bundle"),
            "dataset_dir": (
                PATH,
                "the scans: [Data sets](data.md) says in which layouts; for inference, a file, a folder that is "
                "searched, or a DICOM series; for evaluation, the list `test` of a datalist is scored, else "
                "`validation`, else everything",
            ),
            "output_dir": (PATH, "gets everything that a run writes"),
            "device": (DEVICE, "[where it computes](inference.md#devices); `cuda` if there is a GPU, else `cpu`"),
            "num_workers": (integer("[0, inf)"), "processes that load data; guessed from the machine"),
            "amp": (FLAG, "bfloat16 autocast; on where the device has it in hardware"),
            "compile": (
                either(_words("auto"), FLAG),
                "compile the training step, or the network in inference; `auto`: on a GPU, and in inference for 200 "
                "scans or more. Where that fails the log says why, and it runs as it is",
            ),
            "encoder": (COMPONENT, "the encoder, or [one of your own](python.md)"),
            "encoder#size": (_words("tiny", "small", "base"), "5 M, 21 M or 85 M parameters"),
            "encoder#patch_size": (either(SIDES, _list(SIDES, 2, 3)), "sides of a patch in voxels"),
            "network_def": (COMPONENT, "the network; see its docstring for its arguments"),
        },
        "Training": {
            "cache_dir": (
                either(NULL, PATH),
                "scans after the fixed part of the preprocessing, in half precision; several runs may share it; "
                "`null`: none are kept",
            ),
            "resume": (
                FLAG,
                "continue from the checkpoint in `output_dir`, which must be of a run with the same settings and "
                "data; `false`: start afresh and keep the old checkpoint as `checkpoint_previous.pt`",
            ),
            "seed": (
                integer("[0, 4294967295]"),
                "of the split, the weights and all random draws; on the CPU, the same seed gives the same weights",
            ),
            "epochs": (
                integer("[1, inf)"),
                "passes over the data; the schedules of learning rate and masks span all of them",
            ),
            "crops_per_scan": (integer("[1, inf)"), "crops of every training scan in an epoch"),
            "batch_size": (integer("[1, inf)"), "crops in a step"),
            "learning_rate": (
                _number("(0, inf)"),
                "of the decoder in fine-tuning, of everything in pretraining; a tenth where MONAI Label continues "
                "from a trained model",
            ),
            "lr_scheduler#warmup_share": (
                SHARE,
                "the learning rate rises in this share of all steps, then falls by a half cosine",
            ),
            "optimizer#params#weight_decay": (_number("[0, inf)"), "of AdamW, for matrices alone"),
            "val_fraction": (_number("[0, 1)"), "share of the subjects held out for validation; 0 for none"),
            "val_interval": (integer("[1, inf)"), "epochs between two validations"),
            "crops": (COMPONENT, "how crops are drawn and changed"),
            "crops#sampler": (COMPONENT, "where crops lie, and how they are scaled, turned and flipped"),
            "crops#sampler#scale": (_range("(0, inf)"), "spacing of a crop over that of its scan, drawn for each axis"),
            "crops#sampler#rotate": (_number("[0, inf)"), "largest rotation about each axis, in rad"),
            "crops#sampler#flip_prob": (
                either(SHARE, _list(SHARE, 2, 3)),
                "share of crops mirrored along each axis, the first from left to right; `0` where label values tell "
                "left from right",
            ),
            "crops#augmentation": (COMPONENT, "what is done to whole batches of crops, by name, in this order"),
            "data_on_device": (
                _words("auto", "device", "host", "disk"),
                "where the scans lie while crops are drawn; `auto`: the first of the others in which they take at most "
                "half of the free memory",
            ),
            "validate#max_scans": (either(integer("[1, inf)"), ALL), "validate on this many held-out scans at most"),
            "crop_size": (_list(SIDES, 2, 3), "sides of the crops in voxels; for super-resolution with the `margin`"),
            "spacing": (
                PER_AXIS,
                "mm to which scans are resampled; in pretraining, only along the axes whose own spacing is outside "
                "[`min_spacing`, `max_spacing`]; restoration works on the scan's own grid",
            ),
            "data_options#skip_unreadable": (
                FLAG,
                "continue without scans that the check refuses, instead of stopping",
            ),
            "data_options#subject_pattern": (
                either(NULL, PATTERN),
                "finds the subject in a scan's path; `null`: a guess from the path",
            ),
            "data_options#bids_suffixes": (
                either(NULL, SUFFIXES),
                "in a BIDS data set, the raw images with these suffixes are scans, such as `[T1w,FLAIR]`; "
                "`null`: the anatomical ones; `all`: every image, derivatives and maps too",
            ),
        },
        "Pretraining": {
            "encoder_path": (PATH, "file of the encoder's weights"),
            "spatial_dims": (integer("[2, 3]"), "the overlay `pretrain_2d.json` sets 2 and draws axial slices"),
            "min_spacing": (PER_AXIS, "mm; axes with a smaller spacing are resampled"),
            "max_spacing": (PER_AXIS, "mm; axes with a larger spacing are resampled"),
            "spacing_jitter": (
                _list(_number("(0, inf)"), 2, ascending=True),
                "voxel size of a crop over that of its scan, drawn for each axis",
            ),
            "mask_ratio": (_number("(0, 1)"), "share of the patches that is hidden"),
            "beta": (_number("(-inf, inf)"), "preference of the masks for high-frequency patches; 0 for uniform masks"),
            "beta_warmup_share": (SHARE, "`beta` rises from 0 in this share of the epochs"),
            "mask": (COMPONENT, "the mask, or [one of your own](python.md)"),
            "mask#gamma": (_number("[0, inf)"), "exponent of the high-pass"),
            "mask#stratify": (FLAG, "mask foreground and background at the same ratio"),
            "noise": (either(NULL, COMPONENT), "what is done to the input; `null` for a clean one"),
            "noise#sigma": (
                _range("[0, inf)"),
                "standard deviation of the thermal noise, as a share of the intensity range",
            ),
            "noise#alpha": (_range("(-inf, inf)"), "exponent of its frequency weight"),
            "noise#motion_prob": (SHARE, "share of the crops with breathing and heartbeat"),
            "noise#breathing": (_range("[0, inf)"), "mm of breathing"),
            "noise#heartbeat": (_range("[0, inf)"), "mm of the heartbeat"),
            "noise#repetition_time": (_range("(0, inf)"), "s between two lines of k-space"),
            "loss_function": (
                COMPONENT,
                "the loss; of segmentation, Dice and cross entropy, which weighs classes by their frequency to the "
                "minus 0.5",
            ),
            "loss_function#spectral_weight": (_number("[0, inf)"), "weight of the spectral term"),
            "loss_function#normalize_target": (FLAG, "predict each patch less its mean over its deviation"),
        },
        "Fine-tuning": {
            "name": (NAME, "of the task: the folder of its output"),
            "pretrained": (
                either(NULL, PATH),
                "an `encoder.pt`, or any checkpoint or model of this bundle; `null`: from scratch",
            ),
            "layer_decay": (
                _number("(0, 1]"),
                "the learning rate of each encoder block is that of the next one times this; 1 from scratch",
            ),
            "optimizer#params#head_factor": (
                either(NULL, _number("(0, inf)")),
                "learning rate of the last layer over that of the decoder; `null`: 10 in segmentation, 1 elsewhere",
            ),
            "freeze_epochs": (
                integer("[0, inf)"),
                "epochs in which the decoder alone learns; as many as `epochs`: the encoder stays as pretrained",
            ),
            "data_options#max_subjects": (
                either(integer("[1, inf)"), ALL),
                "train on this many labelled subjects, drawn by `seed`",
            ),
            "class_names": (
                either(NULL, NAMES),
                "names of the label values 1, 2, ...; `network_def#out_channels` is one more",
            ),
            "network_def#out_channels": (integer("[1, inf)"), "classes, with the background"),
            "whole_head": (
                FLAG,
                "whether the classes are the bundle's own 17 structures: then scans are skull-stripped in "
                "augmentation, and inference keeps the largest region",
            ),
            "roi_size": (_list(SIDES, 3), "sides of the sliding window in voxels"),
            "inferer#overlap": (_number("[0, 1)"), "share by which windows overlap"),
            "validate#sw_batch_size": (integer("[1, inf)"), "windows at a time"),
            "crops#foreground": (SHARE, "share of voxels that are no air, which a crop is to have"),
            "crops#labelled": (
                SHARE,
                "share of crops that are drawn around a labelled voxel, all classes equally often",
            ),
            "crops#augmentation#skull_strip#prob": (SHARE, "share of crops without the skull"),
            "degradation": (
                either(NULL, COMPONENT),
                "restoration: what is done to the clean scan during training; `sigma` as a share of the intensity "
                "range, or `factor` of lost resolution along the axes of a pattern",
            ),
            "margin": (
                integer("[0, inf)"),
                "super-resolution: voxels at each end of the crop that are degraded with it and cut off",
            ),
            "targets": (
                either(NULL, PATH),
                "whole scans: the [table](classification.md#the-table); `null`: `participants.tsv` beside the scans",
            ),
            "target": (either(NULL, TEXT), "whole scans: column of the table"),
            "network_def#visible": (
                _number("(0, 1]"),
                "whole scans: share of the patches that the encoder sees, the brightest; so air costs nothing",
            ),
            "validate#save_model#path": (
                PATH,
                "where the best model goes; `models/model.pt` of the bundle under MONAI Label",
            ),
        },
        "Evaluation": {
            "weights": (PATH, "the model that is scored or that runs; for inference also [a `.pt2`](export.md)"),
            "evaluation#tolerance": (_number("[0, inf)"), "mm, of the surface Dice"),
            "evaluation#largest_component": (FLAG, "as for inference"),
            "max_pictures": (integer("[0, inf)"), "subjects that get a picture"),
            "val_degradation": (either(NULL, COMPONENT), "restoration: what is done to the clean scans"),
            "val_degradation#sigma": (_range("[0, inf)"), "denoising: a number fixes the level"),
            "val_degradation#factor": (_range("[1, inf)"), "super-resolution: a number fixes the level"),
        },
        "Inference": {
            "bids_suffixes": (either(NULL, SUFFIXES), "as `data_options#bids_suffixes`"),
            "output_postfix": (NAME, "the result of `scan.nii.gz` is named `scan_seg.nii.gz` with `seg`"),
            "overwrite": (
                FLAG,
                "write results again that are there; else an interrupted batch continues where it stopped",
            ),
            "pictures": (FLAG, "a PNG for each scan"),
            "dicom": (
                FLAG,
                "DICOM results for DICOM scans: a DICOM SEG that references the series, or a new series; needs "
                "highdicom",
            ),
            "inferer#sw_batch_size": (integer("[1, inf)"), "windows at a time; 8 on a GPU, else 1"),
            "largest_component": (
                FLAG,
                "segmentation: keep the largest connected region of all structures together; by default for the "
                "bundle's own structures alone",
            ),
            "factor": (
                either(_number("[1, inf)"), _list(_number("[1, inf)"), 3), NULL),
                "super-resolution: voxels after over voxels before, one number or one for each axis of the file",
            ),
            "target_spacing": (
                either(NULL, _number("(0, inf)"), PER_AXIS),
                "super-resolution: the spacing wanted, in mm, instead of `factor`",
            ),
            "data_consistency": (
                FLAG,
                "super-resolution: keep the measured part of k-space exactly, which the weights that ship count on",
            ),
            "load_weights": (FLAG, "`false` where the network brings its own, as a `.pt2` and TensorRT's do"),
        },
    }.items()
    for name, (takes, text) in rows.items()
}
