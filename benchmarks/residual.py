"""The head of our restoration network on other networks."""

from __future__ import annotations

from torch import Tensor, nn

from sspformer.intensity import noise_level


class ResidualNetwork(nn.Module):
    """A network whose features become a residual as in :class:`sspformer.networks.SSPFormerDense`: a 1 x 1 x 1
    convolution that starts at 0 makes an image of them, which is scaled as ours is, and the input is added. (MONAI's
    Restormer leaves out the sum that its paper has.)

    Args:
        network: from one channel to ``features`` channels on the same grid.
        features: its channels.
        residual_scale: unit of the residual.
        noise_scaled: the unit is the image's noise times that.
    """

    def __init__(self, network: nn.Module, features: int, residual_scale: float, noise_scaled: bool) -> None:
        super().__init__()
        self.network, self.residual_scale, self.noise_scaled = network, residual_scale, noise_scaled
        self.head = nn.Conv3d(features, 1, kernel_size=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, 1, *S)``, sides as the network takes them, to the restored image of the same shape."""
        scale = self.residual_scale * (noise_level(image) if self.noise_scaled else 1.0)
        return image + scale * self.head(self.network(image))
