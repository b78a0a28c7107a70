"""MONAI transforms of the method: each a pure batched function, an array transform and its dictionary twin."""

from .batched import (
    BatchedBiasField,
    BatchedContrast,
    BatchedDownsampling,
    BatchedNoise,
    BatchedResolution,
    BatchedSkullStrip,
)
from .crops import CropSampler, resample
from .grid import InvertArgmaxd, KeepOnlyAffined, argmax_on_grid
from .intensity import BlendByNoiseLeveld, ScaleByPercentilesd
from .masking import (
    InverseFrequencyMask,
    MaskIndices,
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
from .resolution import (
    DataConsistencyd,
    FourierResampled,
    RandReducedResolution,
    RandReducedResolutiond,
    ResolutionSampler,
    reduce_resolution,
)
from .seeded import SeededTransform, SeededTransformd
