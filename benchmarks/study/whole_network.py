"""Pretraining of the whole segmentation network, convolutional path and decoder too: a contender, not in the bundle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sspformer.networks import SSPFormerDense, gather_tokens, pad_to_patches, patchify
from sspformer.networks.encoder import Encoder


class MaskedDense(nn.Module):
    """The segmentation network draws the masked patches of a scan; in place of ``MaskedAutoencoder`` in pretrain.json.

    The encoder sees visible tokens alone; one learnt vector stands for the others. On every grid of the convolutional
    path what lies in masked patches is set to 0, so that nothing flows around the mask: after SparK (Tian et al.,
    arXiv 2301.03580).

    Args:
        encoder: see :class:`sspformer.networks.Encoder`; must have ``embed``, as ours has.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        # what SaveEncoder writes is the whole network, and load_pretrained takes all of it but the head
        self.encoder = SSPFormerDense(encoder, out_channels=encoder.in_channels)
        self.patch_size = tuple(encoder.patch_size)
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.token_projection.out_features))

    def forward(self, image: Tensor, ids_keep: Tensor, ids_predict: Tensor) -> Tensor:
        """As :meth:`sspformer.networks.MaskedAutoencoder.forward`."""
        dense, encoder = self.encoder, self.encoder.encoder
        tokens, rotation = encoder.embed(image, ids_keep)
        hidden = {}
        for depth, block in enumerate(encoder.blocks, start=1):
            tokens = block(tokens, rotation)
            hidden[depth] = tokens
        hidden[len(encoder.blocks)] = encoder.norm(tokens)
        seen = torch.cat([norm(hidden[d]) for d, norm in zip(dense.depths, dense.token_norms, strict=True)], dim=-1)
        seen = dense.token_projection(seen)
        grid = encoder.grid(image.shape[2:])
        where = ids_keep[..., None]
        every = self.mask_token.to(seen.dtype).expand(len(image), ids_keep.shape[1] + ids_predict.shape[1], -1)
        every = every.scatter(1, where.expand_as(seen), seen)
        visible = image.new_zeros(len(image), every.shape[1], 1).scatter(1, where, 1.0)
        visible = visible.transpose(1, 2).unflatten(2, grid)

        padded, detail = pad_to_patches(image, self.patch_size), []
        stage_in = padded * _as_large_as(visible, padded)
        for stage in dense.stem:
            stage_in = stage(stage_in)
            stage_in = stage_in * _as_large_as(visible, stage_in)
            detail.append(stage_in)
        drawn = dense.forward_decoder(every.transpose(1, 2).unflatten(2, grid), detail)
        return gather_tokens(patchify(drawn, self.patch_size), ids_predict)


def _as_large_as(mask: Tensor, image: Tensor) -> Tensor:
    """A mask of the token grid ``(B, 1, *grid)`` on the grid of an image."""
    for axis in range(2, mask.ndim):
        mask = mask.repeat_interleave(image.shape[axis] // mask.shape[axis], dim=axis)
    return mask.to(image.dtype)
