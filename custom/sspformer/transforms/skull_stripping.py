"""Skull stripping as an augmentation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor


class RandSkullStripd(RandomizableTransform, MapTransform):
    """Set an image to 0 outside its labelled structures and a margin around them.

    A network that has only seen whole heads takes the black around a stripped brain for anatomy. A crop without labels
    becomes air.

    Args:
        keys: images ``(C, *S)``.
        label_key: their labels ``(1, *S)``, 0 for the background.
        prob: probability of applying it.
        margin: most voxels that are kept around the structures; drawn from 0 to this number.
        allow_missing_keys: do not raise if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str = "label",
        prob: float = 0.25,
        margin: int = 3,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.label_key, self.margin = label_key, margin
        self._margin = 0

    def randomize(self, data=None) -> None:
        super().randomize(None)
        self._margin = int(self.R.randint(self.margin + 1))

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        d = dict(data)
        self.randomize()
        if not self._do_transform:
            return d
        brain = (torch.as_tensor(d[self.label_key]).as_subclass(Tensor) > 0).float()[None]
        dilate = F.max_pool3d if brain.ndim == 5 else F.max_pool2d
        brain = dilate(brain, 2 * self._margin + 1, stride=1, padding=self._margin)[0]
        for key in self.key_iterator(d):
            d[key] = d[key] * brain.to(d[key].dtype)
        return d
