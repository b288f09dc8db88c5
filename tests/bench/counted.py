import torch

from bench.measure import floating_point_operations
from mimdit.transformer import MiMDiTTransformer2DModel


@torch.no_grad()
def step_flops(model: MiMDiTTransformer2DModel, batch: int, height: int, width: int) -> int:
    """FLOPs that torch counts in one step of a model with a given condition."""
    model.requires_grad_(False)
    x = torch.randn(batch, model.config["in_channels"], height, width)
    condition = model.encode_condition(x)
    t = torch.full((batch,), 500.0)
    return floating_point_operations(lambda: model.predict(x, t, condition))
