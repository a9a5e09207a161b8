"""The key–value cache: what attention has computed for earlier positions, kept instead of computed again.

Legend: L layers, B batch, Hkv key/value heads, D width of one head, T new positions.
Without it, token t costs a forward pass over t positions; with it, over one (Vaswani et al. 2017, §3.2.3
implies it: an earlier position never depends on a later one). Its size is 2·L·B·Hkv·D·max_length numbers.
"""

import torch
from torch import Tensor, nn

from shared.runtime.errors import CourseError


class KVCache:
    """Keys and values of all layers, allocated once for the longest sequence.

    The model calls `update` in each layer, then `advance` once. A model with a sliding window reads only the
    last `window` positions of what `update` returns; all are kept.

    Args:
        num_layers: L.
        batch: B.
        num_kv_heads: Hkv; fewer than the query heads in multi-query and grouped-query attention.
        max_length: positions there is room for.
        head_dim: D.
        dtype, device: of keys and values as the model computes them.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (batch, num_kv_heads, max_length, head_dim)
        # One tensor a layer: indexing a list costs a twentieth of indexing a tensor, and decoding does it 2L
        # times.
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.max_length = max_length
        self.length = 0
        self.last_token: Tensor | None = None  # (B, 1), kept by models whose embeddings look at token pairs

    @classmethod
    def for_model(cls, model: nn.Module, batch: int, max_length: int) -> "KVCache":
        """An empty cache that fits `model`: its layers, heads, device and the dtype of its weights.

        Under autocast keys and values come in another dtype than the weights; they are kept in the weights'.
        """
        config = model.config
        heads = getattr(config, "num_kv_heads", None) or config.num_heads
        weight = next(model.parameters())
        return cls(config.num_layers, batch, heads, max_length, config.head_dim, weight.dtype, weight.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values.

        Args:
            layer: 0 … L − 1.
            k, v: (B, Hkv, T, D), positions `length` … `length` + T − 1.

        Returns:
            Keys and values of all positions so far, (B, Hkv, `length` + T, D): views, not copies.

        Raises:
            CourseError: there is no room for T more positions.
        """
        T = k.shape[2]
        end = self.length + T
        if end > self.max_length:
            raise CourseError(
                f"The cache has room for {self.max_length} positions and {end} are needed; "
                "generate fewer tokens, or from a shorter prompt."
            )
        keys, values = self._keys[layer].narrow(2, 0, end), self._values[layer].narrow(2, 0, end)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        return keys, values

    def advance(self, count: int) -> None:
        """Count `count` positions as kept, once every layer has updated them."""
        self.length += count

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was: the hypotheses of a beam follow their parents.

        Args:
            rows: (B,) int64.
        """
        for stored in (*self._keys, *self._values):
            used = stored.narrow(2, 0, self.length)
            used.copy_(used.index_select(0, rows))
        if self.last_token is not None:
            self.last_token = self.last_token.index_select(0, rows)

    def clear(self) -> None:
        """Forget everything, keep the memory."""
        self.length = 0
        self.last_token = None

    @property
    def num_bytes(self) -> int:
        """Memory set aside, in bytes."""
        return sum(stored.nbytes for stored in (*self._keys, *self._values))
