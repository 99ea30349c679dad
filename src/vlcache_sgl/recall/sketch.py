"""A sketch of keys: a bit per dimension and a scale, from which a logit is estimated without the key.

A key `k` is turned by a random rotation `R` that is the same for every model, layer, head and request, and the signs
`s` of the turned key are kept, with one factor:

    q . k  is estimated by  f (R q) . s    with    f = |k|^2 / (R k) . s = |k|^2 / |R k|_1

The factor makes the estimate exact for a query along the key, so that the error comes from the part of the query across
the key alone, and is unbiased over rotations (RaBitQ, 2405.12497).  A code depends on its own key and on nothing else:
not on other tokens, on where a chunk ends, or on who asked before.
"""

from __future__ import annotations

import torch

from vlcache_kernels.sketch_scores import sketch_scores
from vlcache_sgl.capacity import code_bytes

SEED = 0
"""Of the rotation: sketches of one head size are alike in every process and on every device."""


class KeySketch:
    """Codes of keys, and what a query is worth to them.

    Error of an estimate, with `c` the cosine between a turned key and its signs (0.80 on average):
    at most `tan(arccos c) |k| |q across k|`, and over rotations a standard deviation of
    `0.76 |k| |q across k| / sqrt(D - 1)`; float16 adds 0.05 % of the estimate.

    Args:
        head_dim: D, a multiple of 8.
        device: of the codes.
        seed: of the rotation.

    Attributes:
        bytes: of one token's code per KV head, `D / 8 + 2`: 10 for D = 64 and 18 for D = 128, 3.9 % and 3.5 % of the
            token's keys and values in bfloat16.
        rotation: `[D, D]` float32; a row turned is `row @ rotation`.
    """

    def __init__(self, head_dim: int, device: torch.device | str, seed: int = SEED) -> None:
        if head_dim < 8 or head_dim % 8:
            raise ValueError(f"a sketch needs a head size that is a multiple of 8, got {head_dim}")
        self.head_dim = head_dim
        self.bytes = code_bytes(head_dim)
        generator = torch.Generator().manual_seed(seed)
        # Orthogonal, uniformly among all: the signs of the diagonal make QR unique.
        drawn = torch.randn(head_dim, head_dim, dtype=torch.float64, generator=generator)
        orthogonal, upper = torch.linalg.qr(drawn)
        self.rotation = (orthogonal * upper.diagonal().sign()).float().to(device)
        # `[1 or K, D, D]`
        self._keys = self._queries = self.rotation[None]
        self._bits = (1 << torch.arange(8, device=device)).to(torch.uint8)

    def encode(self, keys: torch.Tensor) -> torch.Tensor:
        """Codes of keys.

        Args:
            keys: `[n, K, D]`, as stored (post-RoPE).

        Returns:
            `[n, K, bytes]` uint8: bit `i` of byte `j` is set where dimension `8 j + i` of the turned key is not
            negative; the last two bytes are the factor.
        """
        turned = (keys.float().transpose(0, 1) @ self._keys).transpose(0, 1)
        signs = (turned >= 0).unflatten(-1, (-1, 8))
        packed = (signs * self._bits).sum(-1, dtype=torch.uint8)
        length = turned.abs().sum(-1, keepdim=True)
        largest = torch.finfo(torch.float16).max
        factor = (turned.square().sum(-1, keepdim=True) / length.clamp(min=1e-30)).clamp(max=largest)
        return torch.cat([packed, factor.to(torch.float16).view(torch.uint8)], dim=-1)

    def scores(self, queries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Estimated logits.

        Args:
            queries: `[H, D]`, post-RoPE; H is a multiple of K, neighbouring query heads share a KV head.
            codes: `[n, K, bytes]`.

        Returns:
            `[H, n]` float32, estimates of `q . k` without the scale of attention; higher = more attention.
        """
        rows = torch.arange(codes.shape[0], device=codes.device)
        return self.batch_scores(queries[None], codes, rows[None])[0]

    def batch_scores(self, queries: torch.Tensor, codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`scores` of several requests.

        Args:
            queries: `[B, H, D]`.
            codes: `[R, K, bytes]`.
            rows: `[B, n]` int, which codes are of each request's tokens; not negative.

        Returns:
            `[B, H, n]` float32.
        """
        by_head = queries.float().unflatten(1, (codes.shape[1], -1))
        return sketch_scores((by_head @ self._queries).flatten(1, 2), codes, rows)
