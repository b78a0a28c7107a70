"""What the random transforms share: a seed drawn from MONAI's random state, for a generator on the image's device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor
from torch import Tensor

from .. import kspace


class SeededTransform(RandomizableTransform):
    """Array transform of one image ``(C, *S)``; subclasses implement :meth:`apply`.

    The result has the image's affine, or is a tensor where the image has none. Spacing is read from a MetaTensor.

    Args:
        prob: probability of applying it.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, prob: float = 1.0) -> None:
        super().__init__(prob)
        self._seed = 0

    def randomize(self, data=None) -> None:
        super().randomize(None)
        self._seed = int(self.R.randint(2**31))

    def apply(self, image: Tensor, spacing: Tensor | None, generator: torch.Generator) -> Tensor:
        """A batch of one image, ``(1, C, *S)``, float32, its spacing in mm, and a generator on its device."""
        raise NotImplementedError

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> Tensor:
        img = convert_to_tensor(img, track_meta=True, dtype=torch.float32)
        if randomize:
            self.randomize()
        if not self._do_transform:
            return img
        generator = torch.Generator(img.device).manual_seed(self._seed)
        result = self.apply(img.as_subclass(Tensor)[None], kspace.spacing_of(img), generator)[0]
        return convert_to_dst_type(result, img, dtype=result.dtype)[0]


class SeededTransformd(RandomizableTransform, MapTransform):
    """Dictionary twin of a :class:`SeededTransform`.

    Args:
        keys: entries to transform.
        transform: the array transform, whose random state is set with this one's.
        prob: probability of applying it, drawn once for all keys.
        allow_missing_keys: do not raise if a key is missing.
        shared: all keys get the same draws; otherwise each gets its own.
    """

    backend = SeededTransform.backend

    def __init__(
        self,
        keys: KeysCollection,
        transform: SeededTransform,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
        shared: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.transform, self.shared = transform, shared

    def set_random_state(self, seed=None, state=None) -> SeededTransformd:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        d = dict(data)
        self.randomize(None)
        if self.shared:
            self.transform.randomize()
        for key in self.key_iterator(d):
            d[key] = convert_to_tensor(d[key], track_meta=True, dtype=torch.float32)
            if self._do_transform:
                d[key] = self.transform(d[key], randomize=not self.shared)
        return d
