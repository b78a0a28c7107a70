"""Preprocessed scans on the disk."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pickle import UnpicklingError
from typing import Any

import torch
from monai.data import PersistentDataset
from monai.utils import convert_to_tensor

from ..io.files import digest, replacing, stats
from ..io.load import files_of

__all__ = ["CachedDataset", "file_hashing"]


class CachedDataset(PersistentDataset):
    """MONAI's ``PersistentDataset``, whose files several processes may write and read at a time, on any file system.

    MONAI moves a file from the system's temporary folder, which copies it where that is another file system, so that a
    kill or a second reader meets half of one; and of the errors of reading half a file it knows one. Here a file is
    written beside its place and renamed, and one that cannot be read is made anew.
    """

    def _cachecheck(self, item_transformed: Any) -> Any:
        if self.cache_dir is None:
            return super()._cachecheck(item_transformed)
        file = self.cache_dir / f"{self.hash_func(item_transformed).decode()}{self.transform_hash}.pt"
        if file.is_file():
            try:
                return torch.load(file, weights_only=self.weights_only)
            except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
                warnings.warn(f"{file} cannot be read ({type(error).__name__}) and is made anew", stacklevel=2)
        content = self._pre_transform(deepcopy(item_transformed))
        with contextlib.suppress(PermissionError), replacing(file, shared=True) as part:  # a cache that is only read
            torch.save(convert_to_tensor(content, convert_numeric=False, track_meta=self.track_meta), part)
        return content


def file_hashing(item: Mapping) -> bytes:
    """Hash of an item and of the state of its files, for ``hash_func`` of MONAI's ``PersistentDataset``: a label map
    that was saved anew under its old name is read anew. Our own items have that state as their "version"."""
    keys = () if "version" in item else ("image", "label")
    files = [file for key in keys if key in item for file in files_of(item[key])]
    return digest([item, stats(files)]).encode()
