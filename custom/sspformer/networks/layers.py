"""Layers: patches, axial rotary positions, attention and transformer blocks, convolutions.

MONAI's ``ViT`` fixes the image size in its position embedding, and its attention is explicit unless asked otherwise.
These blocks take any token grid and use ``scaled_dot_product_attention``, the fastest kernel of each device.

``torch.jit.script`` and ``torch.export`` can follow every forward pass for any image size: sizes are ``list[int]``, and
no branch or constant depends on the sides of one image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def token_grid(image_size: list[int], patch_size: list[int]) -> list[int]:
    """Tokens along each side of an image, the last one perhaps padded: ``ceil(S / patch_size)``."""
    return [(side + patch - 1) // patch for side, patch in zip(image_size, patch_size)]


def pad_to_patches(image: Tensor, patch_size: list[int]) -> Tensor:
    """Repeat the last voxels of ``(B, C, *S)`` until every side is a multiple of the patch.

    Where all are, the image itself is returned; not so in graphs that are made for any size.
    """
    size = image.shape[2:]
    padding: list[int] = []
    for tokens, patch, side in zip(token_grid(size, patch_size), patch_size, size):
        padding = [0, tokens * patch - side] + padding  # the last axis comes first
    if not torch.jit.is_scripting():
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and not any(padding):
            return image
    return F.pad(image, padding, mode="replicate")


def patchify(image: Tensor, patch_size: list[int]) -> Tensor:
    """``(B, C, *S)``, sides multiples of the patch -> patches ``(B, N, C * prod(patch_size))``, last axis of the grid
    fastest."""
    n = len(patch_size)
    return _split_patches(image, patch_size).flatten(n + 1).flatten(1, n)


def gather_patches(image: Tensor, patch_size: list[int], index: Tensor) -> Tensor:
    """The patches ``index`` (B, K) of :func:`patchify`, ``(B, K, C * prod(patch_size))``; no others are copied."""
    n = len(patch_size)
    patches = _split_patches(image, patch_size)
    where: list[Tensor | None] = []
    for axis in range(n, 0, -1):
        side = patches.shape[axis]
        where.insert(0, index % side)
        index = index.div(side, rounding_mode="floor")
    where.insert(0, torch.arange(index.shape[0], device=index.device)[:, None])
    return torch.ops.aten.index(patches, where).flatten(2)


def _split_patches(image: Tensor, patch_size: list[int]) -> Tensor:
    """A view of ``(B, C, *S)``: ``(B, *grid, C, *patch_size)``."""
    n = len(patch_size)
    for axis, patch in enumerate(patch_size):
        image = image.unflatten(2 + 2 * axis, (-1, patch))  # B C g0 p0 g1 p1 ...
    return image.permute([0] + list(range(2, 2 + 2 * n, 2)) + [1] + list(range(3, 3 + 2 * n, 2)))


def unpatchify(patches: Tensor, grid: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """Inverse of :func:`patchify` for a token grid ``grid``: ``(B, N, C * prod(patch_size))`` -> ``(B, C, *S)``."""
    b, n = patches.shape[0], len(grid)
    split = patches.reshape(b, *grid, -1, *patch_size)  # B g0 g1 ... C p0 p1 ...
    order = [0, n + 1, *[i for axis in range(n) for i in (1 + axis, n + 2 + axis)]]
    return split.permute(order).reshape(b, -1, *[g * p for g, p in zip(grid, patch_size)])


def crop_to(image: Tensor, size: list[int]) -> Tensor:
    """The first ``size`` voxels of ``(B, C, *S)``: what is left once the padding of :func:`pad_to_patches` is gone."""
    for axis, side in enumerate(size, start=2):
        image = image.narrow(axis, 0, side)
    return image


def fold(image: Tensor, factor: list[int]) -> Tensor:
    """Space to depth, ``(B, C, *S)`` to ``(B, C * prod(factor), *(S / factor))``; sides are multiples of the factor."""
    for i in range(len(factor)):
        if factor[i] > 1:
            places = [image.shape[2 + i] // factor[i], factor[i]]
            image = image.unflatten(2 + i, places).movedim(3 + i, 2).flatten(1, 2)
    return image


def unfold(image: Tensor, factor: list[int]) -> Tensor:
    """Inverse of :func:`fold`."""
    for i in range(len(factor) - 1, -1, -1):
        if factor[i] > 1:
            channels = [image.shape[1] // factor[i], factor[i]]
            image = image.unflatten(1, channels).movedim(2, 3 + i).flatten(2 + i, 3 + i)
    return image


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens ``(B, N, D)`` at ``index`` (B, K) -> ``(B, K, D)``."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class RotaryPosition(nn.Module):
    """Axial rotary position encoding (RoPE) of a 2D or 3D token grid: no parameters, any grid size.

    Each spatial axis turns its share of the channel pairs of queries and keys by angles proportional to the token's
    coordinate, so that attention sees relative positions only. Pairs left over are not turned.
    After Su et al., "RoFormer", arXiv 2104.09864, and its axial form for images, Heo et al., arXiv 2403.13298.

    Args:
        head_dim: channels of an attention head, even and at least ``2 * spatial_dims``.
        spatial_dims: 2 or 3.
        base: the slowest pair turns ``base`` times slower than the fastest.
    """

    def __init__(self, head_dim: int, spatial_dims: int, base: float = 100.0) -> None:
        super().__init__()
        pairs = head_dim // (2 * spatial_dims)
        if head_dim % 2 or pairs == 0:
            raise ValueError(f"head_dim must be even and at least {2 * spatial_dims}, got {head_dim}.")
        frequency = torch.zeros(spatial_dims, head_dim // 2)
        for axis in range(spatial_dims):
            frequency[axis, axis * pairs : (axis + 1) * pairs] = base ** (-torch.arange(pairs) / pairs)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, grid: list[int]) -> Tensor:
        """What :func:`rotate` multiplies every token of ``grid`` by: ``(2, N, head_dim)``, float32."""
        axes = [torch.arange(side, device=self.frequency.device, dtype=torch.float32) for side in grid]
        coordinates = torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).reshape(-1, len(grid))
        angle = (coordinates[:, :, None] * self.frequency).sum(dim=1)  # not a matmul: autocast would round it
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def select_positions(rotation: Tensor, index: Tensor) -> Tensor:
    """Rotations ``(2, N, head_dim)`` at ``index`` (B, K) -> ``(2, B, K, head_dim)``."""
    return rotation[:, index]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the channel pairs of ``x`` (..., N, head_dim), each a channel of the first half and one of the second, by
    ``rotation`` (2, ..., N, head_dim) of the same type: the first half becomes ``a cos - b sin``, the second
    ``b cos + a sin``."""
    cos, sin = rotation.unbind()
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b, a], dim=-1) * sin


class LayerNorm(nn.LayerNorm):
    """PyTorch's layer norm whose output has the type of its input, under autocast on a GPU, too.

    There autocast would copy bfloat16 tokens to float32, and the float32 output back for each linear layer after it.
    The sums are float32 all the same. A compiler fuses these copies by itself, and CPUs make none.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if x.is_cuda and x.dtype != self.weight.dtype and not torch.compiler.is_compiling():
                with torch.autocast("cuda", enabled=False):
                    return self._in_type_of(x)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def _in_type_of(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


#: keys up to which attention in bfloat16 on a CPU is trained as two matrix products: the scores are kept, and small
SMALL_CONTEXT = 512


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of queries ``(B, heads, N, C)`` to keys and values ``(B, heads, K, C)``.

    The gradient of PyTorch's fused kernel is slow in bfloat16 on a CPU, which multiplies matrices fast in that type.
    """
    if not torch.jit.is_scripting():
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and k.shape[2] <= SMALL_CONTEXT:
            batch = q.shape[:2]
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
            return torch.bmm(scores.softmax(-1), v).unflatten(0, batch)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention with rotary positions: self-attention, or cross-attention to a ``context``.

    Args:
        dim: channels of the tokens, a multiple of ``num_heads``.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}.")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, rotation: Tensor, context: Tensor | None = None, context_rotation: Tensor | None = None
    ) -> Tensor:
        """``x`` (B, N, D) attends to itself, or to ``context`` (B, K, D); returns ``(B, N, D)``.

        Rotations are ``(2, N, head_dim)`` or ``(2, B, N, head_dim)``. ``x`` may be one token ``(1, 1, D)`` for all.
        """
        context = x if context is None else context
        context_rotation = rotation if context_rotation is None else context_rotation
        k, v = self.kv(context).chunk(2, dim=-1)
        q, k, v = self._heads(self.q(x)), self._heads(k), self._heads(v)
        # turned before heads and tokens change places, so that the output of attention lies as the last layer reads it
        q, k = rotate(q, rotation.unsqueeze(-2)), rotate(k, context_rotation.unsqueeze(-2))
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, N, heads, head_dim)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer perceptron with GELU, each with a residual connection.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads.
        cross: attend to a context of visible tokens instead of to the tokens themselves.
    """

    def __init__(self, dim: int, num_heads: int, cross: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.norm_context = LayerNorm(dim) if cross else nn.Identity()
        self.attention = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, rotation: Tensor, context: Tensor | None = None, context_rotation: Tensor | None = None
    ) -> Tensor:
        """Tokens ``(B, N, D)`` -> ``(B, N, D)``."""
        if context is not None:
            context = self.norm_context(context)
        x = x + self.attention(self.norm1(x), rotation, context, context_rotation)
        return x + self.mlp(self.norm2(x))


def convolution(
    spatial_dims: int, in_channels: int, out_channels: int, stride: Sequence[int] | int = 1, norm: bool = False
) -> nn.Sequential:
    """A convolution of 3 voxels, an :class:`InstanceNorm` if asked for, leaky ReLU; ``(B, C, *S)`` in and out.

    Tensors have the names of MONAI's ``Convolution`` block. That takes norms from a global registry, so ours would have
    to be entered there.
    """
    convolve = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
    layers = OrderedDict(conv=convolve(in_channels, out_channels, 3, stride, padding=1, bias=not norm))
    after = OrderedDict(N=InstanceNorm(out_channels)) if norm else OrderedDict()
    layers["adn"] = nn.Sequential(OrderedDict(**after, A=nn.LeakyReLU()))
    return nn.Sequential(layers)


class InstanceNorm(nn.Module):
    """PyTorch's affine instance norm ``(B, C, *S)`` in a form that survives the export to ONNX.

    There the means are taken axis by axis: onnxruntime's own operator adds up all voxels of a channel in one float32 on
    the CPU, which puts logits of a window of 64 x 64 x 64 off by 1e-3.

    Args:
        num_features: channels.
        eps: added to the variance. Larger than usual, or the noise of a window full of air would be blown up to look
            like anatomy.
    """

    def __init__(self, num_features: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *S)``, more than one voxel -> the same shape."""
        if not torch.jit.is_scripting():
            if torch.onnx.is_in_onnx_export():
                return self._by_axis(x)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)

    def _by_axis(self, x: Tensor) -> Tensor:
        def mean(x: Tensor) -> Tensor:
            for axis in range(2, x.ndim):
                x = x.mean(axis, keepdim=True)
            return x

        x = x - mean(x)
        weight, bias = (value.unflatten(0, (-1, *[1] * (x.ndim - 2))) for value in (self.weight, self.bias))
        return x * (mean(x.square()) + self.eps).rsqrt() * weight + bias
