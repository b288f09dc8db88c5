"""What statistics of the damaged picture add to the pooled text, which modulates all blocks."""

import torch
from torch import Tensor, nn

from mimdit.statistics import even


class ConditionEmbedder(nn.Linear):
    """Statistics of a `Routing` to an addition [B,P] to the pooled text; starts at zero.

    Args:
        features: L·d, the number of token means, and of token mean squares, of all layers.
        width: P. statistics: S, how many of the picture there are (`mimdit.statistics`), or 0.
    """

    def __init__(self, features: int, width: int, statistics: int = 0) -> None:
        super().__init__(2 * features, width)
        self.statistics = nn.Linear(statistics, width, bias=False) if statistics else None
        for tensor in self.parameters():
            nn.init.zeros_(tensor)

    def forward(self, input: Tensor) -> Tensor:
        """input: `Routing.pooled`, [L,B,2d+S]: means less their running ones, logarithms of root
        mean squares, and statistics of the picture, the same ones in every layer.
        """
        width = self.in_features // (2 * len(input))
        means, squares, statistics = input.tensor_split((width, 2 * width), dim=-1)
        # Each [B,L·d]; without the squares noise and blur, which have no mean, would be unseen.
        parts = (part.transpose(0, 1).flatten(1) for part in (means, squares))
        seen = [nn.functional.layer_norm(x, x.shape[1:]).to(self.weight.dtype) for x in parts]
        added = super().forward(torch.cat(seen, dim=1))
        if self.statistics is None:
            return added
        return added + self.statistics(even(statistics[0]).to(self.weight.dtype))
