"""Datalists: JSON files that list scans, as of the Medical Segmentation Decathlon and of nnU-Net."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..io.files import NIFTI_SUFFIX, write_atomically
from .folders import walk

__all__ = ["SPLITS", "has_lists", "read_datalist", "read_json", "write_datalist"]

SPLITS = ("training", "validation", "test")  # the lists of a datalist


def has_lists(content: Mapping) -> bool:
    """Whether the content of a dataset.json lists scans (nnU-Net's of version 2 does not)."""
    return any(isinstance(content.get(split), list) for split in SPLITS)


def read_json(file: Path) -> dict:
    """The object in a JSON file; raises `ValueError` naming the file."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"the datalist {file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f'the datalist {file} must hold a JSON object with lists such as "training".')
    return content


def read_datalist(file: Path, with_labels: bool = False) -> dict[Path, dict]:
    """The files that a datalist names, each with the fields that its `Scan` gets: "split", "subject", "reason", ...

    Args:
        file: JSON; its paths are relative to its folder.
        with_labels: read the "label" of each item as the "label_map" of its image.
    """
    lists = read_json(file)
    if not has_lists(lists):
        raise ValueError(
            f'the datalist {file} needs a list "training" of {{"image": path}} (and may have "validation" and "test").'
        )
    found: dict[Path, dict] = {}
    for split in SPLITS:
        # without a list "validation", be it empty, "training" is still to be split
        is_split = split == "test" or isinstance(lists.get("validation"), list)
        for item in lists.get(split) or []:
            item = item if isinstance(item, dict) else {"image": item}
            images = [item.get("image")] if isinstance(item.get("image"), str) else item.get("image")
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                raise ValueError(f'the datalist {file}: the item {item} of "{split}" has no "image" path.')
            known = {"split": split if is_split else "", "subject": str(item.get("subject", ""))}
            if with_labels and isinstance(item.get("label"), str):
                known["label_map"] = file.parent / item["label"]
            if with_labels and len(images) > 1 and any(map(NIFTI_SUFFIX.search, images)):
                known["reason"] = 'several channels, and one is read: its "image" must be one file'
            for path in (file.parent / image for image in images):
                for one in walk(path) if path.is_dir() else [_first_channel(path)]:
                    if one in found:
                        raise ValueError(f'the datalist {file} lists {one} twice, the second time in "{split}".')
                    found[one] = known
    return found


def _first_channel(image: Path) -> Path:
    """The file that nnU-Net (version 1) means, whose dataset.json lists `x_0000.nii.gz` as `x.nii.gz`."""
    first = image.with_name(NIFTI_SUFFIX.sub(r"_0000\g<0>", image.name))
    return first if first.exists() and not image.exists() else image


def write_datalist(lists: Mapping[str, list[dict]], file: Path) -> None:
    """Writes the split as a datalist, so that later runs hold out the same scans.

    Where the same scans serve for training and validation, the list "validation" is left out: a datalist may name a
    file once, and without the list a later run lets them serve for both again.
    """
    if lists["training"] == lists["validation"]:
        lists = {split: items for split, items in lists.items() if split != "validation"}
    content = {}
    for split, items in lists.items():
        files = {str(item["image"]): item for item in items}  # a 4D file has an item for each volume
        keys = ("image", "label", "subject")
        content[split] = [{key: item[key] for key in keys if key in item} for item in files.values()]
    write_atomically(file, json.dumps(content, indent=1) + "\n")
