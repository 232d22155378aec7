"""The transformer of MobileViT on a channels-last map, without unfold, fold or permute copies.

LayerNorm, the projections and the feed-forward network work on each pixel separately. Only the attention depends on
the patches, and its kernel reads and writes the map in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.dispatch import checks
from mvkernels.dispatch.backend import requested
from mvkernels.dispatch.exporting import exports_reference
from mvkernels.nn.fused_layer import fused_layer, wanted
from mvkernels.ops.patch_attention import patch_attention

_NAME = "PatchTransformer"


def patch_transformer_layer(
    x: Tensor,
    *,
    norm1: nn.Module,
    qkv: nn.Linear | tuple[nn.Linear, nn.Linear, nn.Linear],
    proj: nn.Module,
    norm2: nn.Module,
    fc1: nn.Module,
    activation: Callable[[Tensor], Tensor],
    fc2: nn.Module,
    heads: int,
    patch_size: tuple[int, int] = (2, 2),
    scale: float | None = None,
    proj_dropout: nn.Module | None = None,
    hidden_dropout: nn.Module | None = None,
    out_dropout: nn.Module | None = None,
    backend: str | None = None,
) -> Tensor:
    """One pre-norm transformer layer of MobileViT (arXiv 2110.02178, section 3.1), given the modules of the layer.

    It computes::

        x = x + proj_dropout(proj(attention(qkv(norm1(x)))))
        x = x + out_dropout(fc2(hidden_dropout(activation(fc1(norm2(x))))))

    where ``attention`` is :func:`mvkernels.patch_attention`. The modules are called on (B, H, W, channels). The whole
    layer runs as one op, :func:`mvkernels.patch_transformer_layer`, without calls of the modules, if they are plain
    ones without hooks and either this was measured to be faster on the device or :func:`fused_layers` asks for it.

    Args:
        x: channels-last map (B, H, W, C), contiguous. Or tokens (B, N, C), which all attend to each other in plain
            PyTorch; exported models use this form.
        norm1, norm2: norms over C, before the attention and before the feed-forward network.
        qkv: one Linear from C to 3C whose rows are [q | k | v], with the rows of a head contiguous in each of the
            three. Or three Linears from C to C: they run as one matrix product of their joined weights, and their
            forwards and hooks are not called.
        proj: Linear from C to C after the attention.
        fc1, activation, fc2: the feed-forward network.
        heads: number of attention heads, a divisor of C.
        patch_size: pair (ph, pw), each at least 1.
        scale: factor of the attention scores, ``(C / heads) ** -0.5`` by default.
        proj_dropout, hidden_dropout, out_dropout: dropout modules, or None.
        backend: passed to :func:`mvkernels.patch_attention`.

    Returns:
        The same shape and memory layout as x.

    The errors are those of :func:`mvkernels.patch_attention` and of the modules.
    """
    if (wanted.value or not x.is_cpu) and x.dim() == 4:
        dropouts = (proj_dropout, hidden_dropout, out_dropout)
        fused = fused_layer(
            x, norm1, qkv, proj, norm2, fc1, activation, fc2, heads, patch_size, scale, dropouts, backend
        )  # fmt: skip
        if fused is not None:
            return fused
    if x.dim() == 3:
        out = _among_tokens(norm1(x), qkv, heads, scale)
    else:
        if isinstance(qkv, tuple):
            # One product over the joined weights is 10 to 20 % faster than three, and joining them costs
            # microseconds: nothing to cache, so nothing that could go stale.
            weights: list[Tensor] = [m.weight for m in qkv]
            biases: list[Tensor] = [m.bias for m in qkv if m.bias is not None]
            packed = F.linear(norm1(x), torch.cat(weights), torch.cat(biases) if biases else None)
        else:
            packed = qkv(norm1(x))
        # split and not unbind: its backward joins the three gradients in one pass, as the product wants them.
        maps = [part.unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2) for part in packed.chunk(3, dim=-1)]
        out = patch_attention(maps[0], maps[1], maps[2], patch_size, scale=scale, backend=backend)
        out = out.permute(0, 3, 4, 1, 2).flatten(-2)
    out = proj(out)
    x = x + (out if proj_dropout is None else proj_dropout(out))

    hidden = activation(fc1(norm2(x)))
    out = fc2(hidden if hidden_dropout is None else hidden_dropout(hidden))
    return x + (out if out_dropout is None else out_dropout(out))


def _among_tokens(
    x: Tensor, qkv: nn.Linear | tuple[nn.Linear, nn.Linear, nn.Linear], heads: int, scale: float | None
) -> Tensor:
    """(B, N, C) -> (B, N, C): attention between all tokens, with ops that every converter supports."""
    if isinstance(qkv, tuple):  # three products: joined weights would be no constants to a converter
        query, key, value = (m(x).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for m in qkv)
    else:
        packed = qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        query, key, value = packed.unbind(0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # bmm and not matmul, which becomes copies that expand nothing where a runtime has no views.
    out = torch.bmm((torch.bmm(query * scale, key.transpose(1, 2))).softmax(-1), value)
    return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def gather_groups(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Map (B, C, H, W) -> (B * ph * pw, N, C), the pixels of each group; the patch divides H and W.

    An exported graph does this once before the layers: its runtime has no kernel that reads the groups in place.
    """
    ph, pw = patch_size
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // ph, ph, width // pw, pw)
    return x.permute(0, 3, 5, 2, 4, 1).reshape(b * ph * pw, (height // ph) * (width // pw), c)


def scatter_groups(x: Tensor, patch_size: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of :func:`gather_groups`: (B * ph * pw, N, C) -> (B, C, H, W)."""
    ph, pw = patch_size
    x = x.reshape(-1, ph, pw, height // ph, width // pw, x.shape[-1])
    return x.permute(0, 5, 3, 1, 4, 2).reshape(-1, x.shape[-1], height, width)


class _Layer(nn.Module):
    def __init__(
        self,
        dim: int,
        heads: int,
        ffn_dim: int,
        patch_size: tuple[int, int],
        dropout: float,
        norm_eps: float,
        activation: nn.Module,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.heads, self.patch_size, self.backend = heads, patch_size, backend
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.activation = activation
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return patch_transformer_layer(
            x,
            norm1=self.norm1,
            qkv=self.qkv,
            proj=self.proj,
            norm2=self.norm2,
            fc1=self.fc1,
            activation=self.activation,
            fc2=self.fc2,
            heads=self.heads,
            patch_size=self.patch_size,
            proj_dropout=self.dropout,
            hidden_dropout=self.dropout,
            out_dropout=self.dropout,
            backend=self.backend,
        )


class PatchTransformer(nn.Module):
    """The transformer of a MobileViT block (arXiv 2110.02178, section 3.1), on a feature map.

    It has ``depth`` pre-norm layers, each with patch attention and a feed-forward network, and a LayerNorm at the end.
    Input and output are maps (B, dim, H, W). The input may have any strides. The output is in channels-last memory if
    the input is, else it is contiguous. A channels-last map is not copied; any other map is converted once before the
    layers and once after them. H and W need not be multiples of the patch.

    Args:
        dim: channels of the map, a multiple of ``heads``.
        depth: number of layers.
        heads: number of attention heads.
        ffn_dim: hidden width of the feed-forward network, ``2 * dim`` by default.
        patch_size: an int or a pair (ph, pw). Pixels with the same position in their patch attend to each other.
        dropout: dropout probability after the projection and after both layers of the feed-forward network. There is
            no dropout on the attention probabilities, because the fused kernels do not store them.
        norm_eps: epsilon of all LayerNorms.
        activation: class of an element-wise activation module. It is called without arguments, once for each layer.
        final_norm: whether a LayerNorm follows the last layer.
        backend: passed to :func:`mvkernels.patch_attention`.
        device, dtype: device and dtype of the parameters.

    Raises:
        TypeError: ``patch_size`` has the wrong type.
        ValueError: a setting is out of range, or the input of a call is not (B, dim, H, W).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 4,
        ffn_dim: int | None = None,
        patch_size: int | tuple[int, int] = (2, 2),
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        activation: type[nn.Module] = nn.SiLU,
        final_norm: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ffn_dim = 2 * dim if ffn_dim is None else ffn_dim
        for name, value in (("dim", dim), ("heads", heads), ("ffn_dim", ffn_dim)):
            if value < 1:
                raise ValueError(f"{_NAME}: {name} is {value}, want at least 1")
        if depth < 0:
            raise ValueError(f"{_NAME}: depth is {depth}, want at least 0")
        if dim % heads:
            raise ValueError(f"{_NAME}: dim is {dim}, want a multiple of heads = {heads}")
        if backend is not None:
            requested(backend)
        patch = checks.pair(_NAME, "patch_size", patch_size)
        self.dim, self.heads, self.patch_size = dim, heads, patch
        self.layers = nn.ModuleList(
            _Layer(dim, heads, ffn_dim, patch, dropout, norm_eps, activation(), backend) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if final_norm else nn.Identity()
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim, H, W)."""
        checks.map_of(_NAME, x, self.dim)
        if exports_reference("patch_attention") and all(
            checks.known(size % patch == 0) for size, patch in zip(x.shape[2:], self.patch_size)
        ):
            size, x = x.shape[2:], gather_groups(x, self.patch_size)
            for layer in self.layers:
                x = layer(x)
            return scatter_groups(self.norm(x), self.patch_size, *size)
        channels_last = x.stride(1) == 1
        x = x.permute(0, 2, 3, 1).contiguous()
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).permute(0, 3, 1, 2)
        return x if channels_last else x.contiguous()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, patch_size={self.patch_size}"
