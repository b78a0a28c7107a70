"""What is kept on the disk: results of the check, and preprocessed scans."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from monai.data import PersistentDataset
from monai.data.utils import pickle_hashing
from monai.utils import convert_to_tensor

from ..io.files import digest, stats, write_atomically
from ..io.load import files_of
from ..saved import load_checked, save_atomically

logger = logging.getLogger("sspformer")

CHECK_VERSION = 7  # raise it whenever the check changes, so that no result of an older one is used
SAVE_EVERY = 30.0  # seconds


class CheckCache:
    """Results of the check in ``scan_check.json``, by path, size and time of the files and by what was asked.

    Only usable results are kept, each with a check sum. Threads may share a cache. It saves when its context ends, also
    when the run is stopped, and every now and then, for a run that is killed.

    Args:
        output_dir: the folder of the file. None: nothing is kept.
    """

    def __init__(self, output_dir: Path | None = None) -> None:
        self.file = output_dir / "scan_check.json" if output_dir else None
        self._old, self._new = {}, {}
        self._lock, self._saved = threading.Lock(), time.monotonic()
        try:
            stored = json.loads(self.file.read_text()) if self.file and self.file.exists() else {}
            entries = {name.partition("-")[0]: (name, result) for name, result in stored.items()}
            self._old = {key: result for key, (name, result) in entries.items() if name == _name(key, result)}
            damaged = len(self._old) < len(stored)
        except (AttributeError, OSError, ValueError):
            damaged = True
        if damaged:
            logger.warning(f"The cache {self.file} is corrupt: what does not agree with its check sum is read again.")

    def get(self, function: Callable[..., dict], files: list[Path], *args) -> dict:
        """`function(files, *args)`, from the cache if no file has changed."""
        key = digest([function.__name__, CHECK_VERSION, stats(files), args])
        self._new[key] = self._old[key] if key in self._old else function(files, *args)
        with self._lock:
            if time.monotonic() - self._saved >= SAVE_EVERY:
                self._save(self._old | self._new)
        return self._new[key]

    def _save(self, results: dict[str, dict]) -> None:
        if self.file:
            write_atomically(self.file, json.dumps({_name(key, result): result for key, result in results.items()}))
        self._saved = time.monotonic()

    def __enter__(self) -> CheckCache:
        return self

    def __exit__(self, stopped: type[BaseException] | None, *_) -> None:
        with self._lock:
            self._save(self._old | self._new if stopped else self._new)  # what nobody asked for is outdated


def _name(key: str, result: object) -> str:
    """Under which a result is kept: what it is of, and its check sum."""
    return f"{key}-{digest(json.dumps(result))}"


class CachedDataset(PersistentDataset):
    """MONAI's ``PersistentDataset`` for several processes that write and read its files at the same time.

    MONAI moves each file from the system's temporary folder. On another file system that is a copy, and a kill or a
    second reader meets half of it. Here a file is written beside its place and renamed. One that is damaged, or of
    another item, is made again, while MONAI knows only one of the errors that half a file raises.

    Its name is a hash of the item (:func:`file_hashing`) and of the transforms. The affine is kept.

    Args:
        data: the items.
        transform: what comes before its first random transform is kept.
        cache_dir: folder of the files; several runs may share it.
    """

    def __init__(self, data: Sequence[Mapping], transform: Callable, cache_dir: str | os.PathLike) -> None:
        hashing = {"hash_func": file_hashing, "hash_transform": pickle_hashing}
        super().__init__(data, transform, cache_dir, track_meta=True, **hashing)

    def _cachecheck(self, item_transformed: Any) -> Any:
        if self.cache_dir is None:
            return super()._cachecheck(item_transformed)
        file = self.cache_dir / f"{self.hash_func(item_transformed).decode()}{self.transform_hash}.pt"
        if file.is_file():
            try:
                stored = load_checked(file, "it is made again")
                if isinstance(stored, dict) and stored.get("of") == file.stem:
                    return stored["content"]
                problem = f"{file} is not of this item: it is made again."
            except ValueError as error:
                problem = str(error)
            warnings.warn(problem, stacklevel=2)
        content = self._pre_transform(deepcopy(item_transformed))
        kept = convert_to_tensor(content, convert_numeric=False, track_meta=self.track_meta)
        with contextlib.suppress(PermissionError):  # a cache that is only read
            save_atomically({"of": file.stem, "content": kept}, file)
        return content


def file_hashing(item: Mapping) -> bytes:
    """Hash of an item and of the state of its files, the ``hash_func`` of ``CachedDataset``.

    A label map that was saved again under its old name is read again. Our own items carry that state as "version".
    """
    keys = () if "version" in item else ("image", "label")
    files = [file for key in keys if key in item for file in files_of(item[key])]
    return digest([item, stats(files)]).encode()
