"""Small parts that several models share. Shapes: B batch, N = h w tokens, D width, C latent channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from openpae.models.configs import check_heads


def to_grid(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens (B, N, D) in row order to a grid (B, D, h, w). Inverse of `to_tokens`."""
    return tokens.mT.reshape(*tokens.mT.shape[:2], h, w)


def to_tokens(grid: Tensor) -> Tensor:
    """Grid (B, D, h, w) to tokens (B, N, D) in row order. Inverse of `to_grid`."""
    return grid.flatten(2).mT


def to_sphere(z: Tensor, per: str = "token") -> Tensor:
    """Scale latents to unit root mean square (sphere norm, Sec. 3.1 of arXiv:2605.07915).

        z / sqrt(mean(z^2) + 1e-6)

    The latent then lies on a sphere of radius sqrt(C), so a generator has no scale to learn.

    Args:
        z: latents, (B, C, h, w). Computed in float32, also under autocast.
        per: "token" takes the mean over the C channels of each token (the paper), "sample" over C, h and w.
    """
    z = z.float()
    dims = {"token": (1,), "sample": (1, 2, 3)}[per]
    return z * torch.rsqrt(z.square().mean(dim=dims, keepdim=True) + 1e-6)


def unpatchify(patches: Tensor, h: int, w: int, patch: int) -> Tensor:
    """Flat patches (B, h w, p p 3), channels last in each, to images (B, 3, h p, w p)."""
    b = patches.shape[0]
    x = patches.view(b, h, w, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * patch, w * patch)


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Fixed sine-cosine code of positions (N,): (N, dim), sines first, as in ViT-MAE."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.to(torch.float64).outer(frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(h: int, w: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a grid in row order: (h w, dim), columns first, as in ViT-MAE.

    Raises:
        ValueError: dim is not a multiple of 4 (a sine and a cosine for each of the two axes).
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, got {dim}")
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([sincos_1d(columns.flatten(), dim // 2), sincos_1d(rows.flatten(), dim // 2)], dim=1)


def resize_positions(positions: Tensor, trained: tuple[int, int], h: int, w: int) -> Tensor:
    """Positions (1, H W, D) of the training grid (H, W), interpolated (bicubic) to h x w: (1, h w, D)."""
    if (h, w) == trained:
        return positions
    return to_tokens(F.interpolate(to_grid(positions, *trained), size=(h, w), mode="bicubic"))


def rope_2d(
    h: int,
    w: int,
    head_dim: int,
    trained: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D rotary positions, (h w, head_dim) each.

    Half of a head rotates with the row, half with the column; neighbouring channels form a pair (as in
    LightningDiT).

    Args:
        h: rows of the grid.
        w: columns of the grid.
        head_dim: width of a head.
        trained: the training grid (H, W), if it is another. The h rows and w columns then cover the same
            range, as in a resized image.
        device: of the angles.

    Raises:
        ValueError: head_dim is not a multiple of 4 (pairs for each of the two axes).
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary positions need heads whose width is a multiple of 4, got {head_dim}")
    half = head_dim // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    # Cell i of n has the position (i + 1/2) N / n - 1/2 among N cells; this is i if n = N.
    rows, columns = (
        (torch.arange(n, dtype=torch.float32, device=device) + 0.5) * (full / n) - 0.5
        for n, full in zip((h, w), trained or (h, w), strict=True)
    )
    rows = rows.outer(frequencies).repeat_interleave(2, dim=1)  # (h, half)
    columns = columns.outer(frequencies).repeat_interleave(2, dim=1)  # (w, half)
    angles = torch.cat([rows[:, None].expand(h, w, half), columns[None].expand(h, w, half)], dim=-1).reshape(
        h * w, head_dim
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels of x (..., N, head_dim) by the angles of `rope_2d`."""
    pairs = x.view(*x.shape[:-1], -1, 2)
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention of (B, N, D) queries on (B, M, D) keys and values: (B, N, D)."""
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: width D.
        num_heads: heads; must divide D.
        qkv_bias: queries, keys and values have a bias; the output projection always has one.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D). Returns (B, N, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.proj(attend(q, k, v, self.num_heads))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention from one token sequence to another of the same width D; all projections have a
    bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: queries (B, N, D); context: keys and values (B, M, D). Returns (B, N, D)."""
        attended = attend(self.q_proj(x), self.k_proj(context), self.v_proj(context), self.num_heads)
        out: Tensor = self.proj(attended)
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: D -> hidden -> D."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D). Returns (..., D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual (ViT)."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D). Returns (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def run_blocks(blocks: nn.ModuleList, x: Tensor, condition: tuple[Tensor, ...], checkpointed: int) -> Tensor:
    """Apply blocks in sequence to tokens.

    Args:
        blocks: the blocks.
        x: tokens, (B, N, D).
        condition: further arguments of every block.
        checkpointed: how many blocks, from the first, keep only their input for the backward pass and
            recompute the rest. The gradients are the same, these blocks cost a third more and need almost no
            memory.
    """
    for number, block in enumerate(blocks):
        if number < checkpointed and torch.is_grad_enabled():
            # Blocks draw no random numbers, and saving the state of a generator would synchronise the GPU.
            x = checkpoint(block, x, *condition, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *condition)
    return x


def init_vit(module: nn.Module) -> None:
    """Initialise as ViT-MAE does: Xavier-uniform weights of linear layers and convolutions, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d):
            # As a linear layer on the flattened window, so that patches start at the scale of tokens.
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def timestep_features(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sine-cosine features of path positions t (B,) in [0, 1]: (B, dim), cosines first, as in DiT."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate along the sphere between a and b, (B, C, h, w), each flattened: a at t = 0, b at t = 1.

        (sin((1 - t) w) a + sin(t w) b) / sin w,   w = angle between a and b

    If a and b are parallel or opposite, the result is (1 - t) a + t b.
    """
    angle = F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1).clamp(-1, 1).acos()
    angle = angle.view(-1, 1, 1, 1)
    straight = angle.sin() < 1e-6
    sine = torch.where(straight, 1.0, angle.sin())
    weight_a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    weight_b = torch.where(straight, t, (t * angle).sin() / sine)
    return weight_a.to(a) * a + weight_b.to(b) * b
