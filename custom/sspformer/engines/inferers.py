"""MONAI's inferers under bfloat16 autocast.

MONAI's engines use autocast on CUDA only, and by default in float16, which needs loss scaling; see
https://github.com/Project-MONAI/MONAI/issues/4116.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor

from ..options import flag


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 is faster on this device: GPUs from Ampere on, CPUs with AVX-512 (by oneDNN's own test)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class AutocastInferer(SimpleInferer):
    """MONAI's ``SimpleInferer`` under bfloat16 autocast, on CPUs and GPUs; the output is float32.

    Args:
        enabled: False: run in the network's own precision.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = flag(enabled)

    def __call__(self, inputs: Tensor, network, *args, **kwargs):
        autocast = torch.autocast(inputs.device.type, dtype=torch.bfloat16) if self.enabled else nullcontext()
        with autocast:
            output = super().__call__(inputs, network, *args, **kwargs)
        return output.float()


class AutocastSlidingWindowInferer(SlidingWindowInferer):
    """MONAI's ``SlidingWindowInferer`` with a network under bfloat16 autocast, on CPUs and GPUs.

    Windows are blended in float32.

    Args:
        args: of ``SlidingWindowInferer``.
        enabled: False: run in the network's own precision.
        kwargs: of ``SlidingWindowInferer``.
    """

    def __init__(self, *args, enabled: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.enabled = flag(enabled)

    def __call__(self, inputs: Tensor, network, *args, **kwargs):
        def in_autocast(*windows, **options) -> Tensor:
            with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.enabled):
                return network(*windows, **options).float()

        return super().__call__(inputs, in_autocast, *args, **kwargs)
