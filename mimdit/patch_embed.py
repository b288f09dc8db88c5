"""The backbone's patch embedding, with positions that can be moved."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.models.embeddings import PatchEmbed
from torch import Tensor


class ShiftablePatchEmbed(PatchEmbed):
    """Diffusers' `PatchEmbed` whose crop of the position table can be moved off the centre."""

    offset: tuple[int, int] | None = None

    @contextmanager
    def at(self, offset: tuple[int, int] | None) -> Iterator[None]:
        """Take the crop from this corner (top, left) of the table, or None from its centre."""
        before, self.offset = self.offset, offset
        try:
            yield
        finally:
            self.offset = before

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:
        if self.offset is None:
            return super().cropped_pos_embed(height, width)
        size, (top, left) = self.pos_embed_max_size, self.offset
        rows, columns = height // self.patch_size, width // self.patch_size
        table = self.pos_embed.unflatten(1, (size, size))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)
