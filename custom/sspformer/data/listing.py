"""The files of a data set: in a folder, or in the lists of a JSON file."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..io.files import NIFTI_NAME, NIFTI_SUFFIX, stem, write_atomically
from ..io.formats import no_file

SPLITS = ("training", "validation", "test")  # the lists of a datalist

#: what MSD, nnU-Net, MONAI and Auto3DSeg call these lists; upper case is the same
LIST_NAMES = {
    "training": ("training", "train"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}

#: what else of a dataset.json may hold lists, in lower case
NO_SCANS = ("labels", "regions_class_order", "channel_names", "modality", "authors", "keywords")

PAIRED_FOLDERS = (("images", "labels", ""), ("imagesTr", "labelsTr", ""), ("imagesTs", "labelsTs", "test"))


def existing(path: Path) -> Path:
    """The path of a data set.

    Raises:
        FileNotFoundError: with the name that may have been meant, when it is missing.
        ValueError: when it is a pipe or a device.
    """
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise FileNotFoundError(f"dataset_dir {path} does not exist.{hint}")
    if not path.is_dir() and (what := no_file(path)):
        raise ValueError(f"dataset_dir {path} is {what}.")
    return path


def walk(folder: Path, skip: Path | None = None) -> Iterator[Path]:
    """Every file below a folder, sorted; no hidden ones, no DICOMDIR, no folder twice (links may form loops).

    A folder that cannot be read is named itself.
    """
    seen = {os.path.realpath(skip)} if skip else set()
    closed: list[Path] = []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=lambda e: closed.append(Path(e.filename))):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(files) if name[0] != "." and name.upper() != "DICOMDIR")
    yield from closed


def scan_files(folder: Path, skip: Path | None = None) -> Iterator[Path]:
    """As `walk`; of an .hdr/.img pair only the .hdr."""
    return (path for path in walk(folder, skip) if (nifti_files(path) or [path])[0] == path)


def nifti_files(path: Path) -> list[Path]:
    """The files of the NIfTI scan to which a path belongs: itself, or .hdr and .img; empty if it is no NIfTI."""
    if NIFTI_NAME.search(path.name):
        return [path]
    pair = [path.with_suffix(".hdr"), path.with_suffix(".img")]
    return pair if path in pair and all(map(os.path.exists, pair)) else []


def is_dicom(path: Path) -> bool:
    try:
        if no_file(path):
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def pair_folders(root: Path) -> tuple[dict[Path, dict], list[Path]]:
    """The images of a folder such as images/, and the label maps of labels/ that have no image.

    Each image has the fields that its `Scan` gets: its "split", and the "label_map" of the same relative path, even if
    it is missing. Images of the test split need none.
    """
    files: dict[Path, dict] = {}
    orphans: list[Path] = []
    for images, labels, split in PAIRED_FOLDERS:
        images, labels = root / images, root / labels
        if not images.is_dir() or not (labels.is_dir() or split):
            continue
        maps = {_case(path, labels): path for path in scan_files(labels) if NIFTI_SUFFIX.search(path.name)}
        used = set()
        for path in scan_files(images):
            known = {"split": split}
            if NIFTI_SUFFIX.search(path.name):
                case = _case(path, images)
            elif is_dicom(path):
                case = path.relative_to(images).parent.as_posix()
            elif path.is_dir():  # a closed one
                files[path] = known
                continue
            else:
                continue
            without_channel, _, channel = case.rpartition("_")
            if case not in maps and without_channel in maps and re.fullmatch(r"\d{4}", channel):
                case = without_channel
                if channel != "0000":
                    known["reason"] = "a further channel: choose one for each label map in a dataset.json"
            if case in maps or not split:
                known["label_map"] = maps.get(case, labels / f"{case.removesuffix('_0000')}.nii.gz")
            used.add(case)
            files[path] = known
        orphans += [path for case, path in maps.items() if case not in used]
    return files, orphans


def _case(path: Path, folder: Path) -> str:
    return stem(path.relative_to(folder).as_posix())


def read_json(file: Path) -> dict:
    """The object in a JSON file, with its lists of scans under the names of `SPLITS`; empty if there is no such file.

    Raises:
        ValueError: naming the file, when it holds something else; naming a list of another name, which would silently
            not be used.
    """
    try:
        text = file.read_text(encoding="utf-8-sig") if os.path.isfile(file) else "{}"
        content = json.loads(text, object_pairs_hook=_each_name_once)
    except OSError as error:
        raise ValueError(f"the datalist {file} cannot be opened: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the datalist {file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f'the datalist {file} must hold a JSON object with lists such as "training".')
    result: dict = {}
    for name, value in content.items():
        split = next((split for split, names in LIST_NAMES.items() if name.lower() in names), "")
        if split and value is not None and not isinstance(value, list):
            raise ValueError(f'the datalist {file}: "{name}" must be a list of {{"image": path}}, got {value!r:.80}.')
        if split and result.get(split) is not None and value is not None:
            raise ValueError(f'the datalist {file}: "{name}" is a second list "{split}". Give one.')
        if not split and name.lower() not in NO_SCANS and _holds_list(value):
            known = ", ".join(f'"{known}"' for names in LIST_NAMES.values() for known in names)
            raise ValueError(
                f'the datalist {file}: the list "{name}" has none of the names {known}. Rename it, or remove it if it '
                "is no list of scans."
            )
        if not split or value is not None:
            result[split or name] = value
    return result


def _each_name_once(pairs: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f'"{twice}" stands twice in one object')
    return dict(pairs)


def _holds_list(value: object) -> bool:
    return any(map(_holds_list, value.values())) if isinstance(value, dict) else isinstance(value, list) and value != []


def has_lists(content: Mapping) -> bool:
    """Whether the content of a dataset.json lists scans (nnU-Net's of version 2 does not)."""
    return any(split in content for split in SPLITS)


def read_datalist(file: Path, with_labels: bool = False) -> dict[Path, dict]:
    """The files that a datalist names, each with the fields that its `Scan` gets: "split", "subject", "reason", ...

    The "fold" of Auto3DSeg is the split of "training": 0 is for validation, as MONAI's ``datafold_read`` has it.

    Args:
        file: JSON; its paths are relative to its folder.
        with_labels: read the "label" of each item as the "label_map" of its image.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    lists = read_json(file)
    if not has_lists(lists):
        raise ValueError(
            f'the datalist {file} needs a list "training" of {{"image": path}} (and may have "validation" and "test").'
        )
    validated_by_fold = _folds(lists, file)
    found: dict[Path, dict] = {}
    owners: dict[str, tuple] = {}  # the item of each file, whatever way its path is spelt
    for split in SPLITS:
        # an empty list "validation" means none; without the list "training" is still to be split
        is_split = split == "test" or "validation" in lists
        for i, item in enumerate(lists.get(split, [])):
            item = item if isinstance(item, dict) else {"image": item}
            images = [item.get("image")] if isinstance(item.get("image"), str) else item.get("image")
            if not _are_paths(images):
                raise ValueError(f'the datalist {file}: the item {item!r:.200} of "{split}" has no "image" path.')
            subject = item.get("subject")
            known = {"split": split if is_split else "", "subject": "" if subject is None else str(subject)}
            if validated_by_fold and split == "training":
                known["split"] = "validation" if i in validated_by_fold else "training"
            if with_labels and item.get("label") is not None:
                if not _are_paths([item["label"]]):
                    raise ValueError(f'the datalist {file}: the "label" of {item!r:.200} of "{split}" is no path.')
                known["label_map"] = file.parent / item["label"]
            if with_labels and len(images) > 1 and any(map(NIFTI_SUFFIX.search, images)):
                known["reason"] = 'several channels: its "image" must be one file'
            for path in (file.parent / image for image in images):
                for one in _files_at(path, file):
                    if one in found or owners.setdefault(os.path.realpath(one), (split, i)) != (split, i):
                        raise ValueError(f'the datalist {file} lists {one} twice, the second time in "{split}".')
                    found[one] = dict(known)
    _raise_if_moved(list(found), "images", file)
    _raise_if_moved([known["label_map"] for known in found.values() if "label_map" in known], "label maps", file)
    return found


def _folds(lists: Mapping[str, list], file: Path) -> set[int]:
    """The indices of the items of "training" whose "fold" is 0."""
    folds = [item.get("fold") if isinstance(item, dict) else None for item in lists.get("training", [])]
    if not any(fold is not None for fold in folds):
        return set()
    if "validation" in lists or not all(re.fullmatch(r"\d+", str(fold)) for fold in folds):
        raise ValueError(
            f'the datalist {file}: every item of "training" must have a "fold" (0, which is for validation, 1, ...) or '
            'none may. With folds there can be no list "validation".'
        )
    if not (validation := {i for i, fold in enumerate(folds) if int(fold) == 0}):
        raise ValueError(f'the datalist {file}: no item of "training" has the "fold" 0, which is for validation.')
    return validation


def _are_paths(paths: object) -> bool:
    """Whether this is a list of at least one path."""
    return isinstance(paths, list) and bool(paths) and all(isinstance(p, str) and "\0" not in p for p in paths)


def _files_at(path: Path, file: Path) -> Iterator[Path]:
    """The files of an image of a datalist, which may be a folder."""
    if not os.path.isdir(path):
        yield _first_channel(path)
    elif Path(os.path.realpath(file.parent)).is_relative_to(os.path.realpath(path)):
        raise ValueError(f'the datalist {file}: the "image" {path} is the folder of the list, or one above it.')
    else:
        yield from walk(path)


def _raise_if_moved(paths: list[Path], what: str, file: Path) -> None:
    """Says once, and not of each, that no path of a datalist exists."""
    if len(paths) > 1 and not any(map(os.path.lexists, paths)):
        raise ValueError(
            f"the datalist {file}: none of its {len(paths)} {what} exists, such as {paths[0]}. Were they moved, or the "
            f"list? Its paths are absolute, or relative to its folder {file.parent}: correct them, or move it back."
        )


def _first_channel(image: Path) -> Path:
    """The file that nnU-Net (version 1) means, whose dataset.json lists `x_0000.nii.gz` as `x.nii.gz`."""
    first = image.with_name(NIFTI_SUFFIX.sub(r"_0000\g<0>", image.name))
    return first if os.path.exists(first) and not os.path.exists(image) else image


def write_datalist(lists: Mapping[str, list[dict]], file: Path) -> None:
    """Writes the split as a datalist, so that later runs hold out the same scans.

    Where the same scans serve for training and validation, the list "validation" is left out: a datalist may name a
    file once, and without the list a later run lets them serve for both again.
    """
    content = {}
    for split, items in lists.items():
        if split != "validation" or items != lists["training"]:
            files = {str(item["image"]): item for item in items}  # a 4D file has an item for each volume
            keys = ("image", "label", "subject")
            content[split] = [{key: item[key] for key in keys if key in item} for item in files.values()]
    write_atomically(file, json.dumps(content, indent=1) + "\n")
