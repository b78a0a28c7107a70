"""What the random transforms of this package share: a seed drawn from MONAI's random state, for a generator on the
image's device."""

from __future__ import annotations

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import TransformBackends

__all__ = ["SeededTransform", "SeededTransformd"]


class SeededTransform(RandomizableTransform):
    """An array transform whose draws come from a generator on the image's device.

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

    def generator(self, device: torch.device) -> torch.Generator:
        """As the last :meth:`randomize` seeds it."""
        return torch.Generator(device).manual_seed(self._seed)


class SeededTransformd(RandomizableTransform, MapTransform):
    """Dictionary twin of a :class:`SeededTransform`.

    Args:
        keys: entries to transform.
        transform: the array transform, whose random state is set with this one's.
        prob: probability of applying it.
        allow_missing_keys: do not raise if a key is missing.
    """

    backend = SeededTransform.backend

    def __init__(
        self, keys: KeysCollection, transform: SeededTransform, prob: float = 1.0, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.transform = transform

    def set_random_state(self, seed=None, state=None) -> SeededTransformd:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self
