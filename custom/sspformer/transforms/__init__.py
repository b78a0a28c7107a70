"""MONAI transforms of the method: each a pure batched function, an array transform and its dictionary twin."""

from .degradation import (
    RandDownsampledCrop,
    RandDownsampledCropd,
    RandReducedResolution,
    RandReducedResolutiond,
    ResolutionSampler,
    reduce_resolution,
)
from .masking import (
    MaskIndices,
    MaskSampler,
    RandInverseFrequencyMask,
    RandInverseFrequencyMaskd,
    draw_mask,
    high_frequency_map,
    inverse_frequency_mask,
    patch_energy,
    voxel_mask,
)
from .noise import (
    NoiseSampler,
    PhysiologicalMotion,
    RandFrequencyWeightedNoise,
    RandFrequencyWeightedNoised,
    frequency_weighted_noise,
    noise_weight,
)
from .scaling import ScaleBetweenPercentilesd
from .stripping import RandSkullStripd

__all__ = [
    "MaskIndices",
    "MaskSampler",
    "NoiseSampler",
    "PhysiologicalMotion",
    "RandDownsampledCrop",
    "RandDownsampledCropd",
    "RandFrequencyWeightedNoise",
    "RandFrequencyWeightedNoised",
    "RandInverseFrequencyMask",
    "RandInverseFrequencyMaskd",
    "RandReducedResolution",
    "RandReducedResolutiond",
    "RandSkullStripd",
    "ResolutionSampler",
    "ScaleBetweenPercentilesd",
    "draw_mask",
    "frequency_weighted_noise",
    "high_frequency_map",
    "inverse_frequency_mask",
    "noise_weight",
    "patch_energy",
    "reduce_resolution",
    "voxel_mask",
]
