"""What a model must be, and is made, before it is trained."""

import torch

from mimdit import flow
from mimdit.codec import Codec, codec_factor
from mimdit.transformer import MiMDiTTransformer2DModel
from training.config import Settings, in_turn


def check_fit(model: MiMDiTTransformer2DModel, codec: Codec, settings: Settings) -> None:
    """ValueError for crops that the model cannot take, or a weight that its loss has no use for."""
    unit = codec_factor(codec) * model.config["patch_size"]
    most = unit * model.config["pos_embed_max_size"]
    for crop in (crop for stage in settings.stages for crop, _ in in_turn(stage)):
        if crop % unit or crop > most:
            raise ValueError(
                f"stages: expected crops of multiples of {unit} pixels, at most {most}, for this "
                f"model, got {crop}"
            )
    kind = model.config["prediction_type"]
    if settings.weighting != "none" and flow.reads_damage(kind):
        raise ValueError(
            f"weighting: expected none for a model that predicts {kind}, whose loss is a "
            f"logarithm, got {settings.weighting}"
        )


def prepare_(model: MiMDiTTransformer2DModel, settings: Settings) -> None:
    """Freeze what is not trained; trained parameters in float32 or wider, frozen ones in bfloat16
    where the passes are."""
    if not settings.train_backbone:
        model.requires_grad_(False)
        model.mim.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(wide)
        elif settings.mixed_precision == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16)
