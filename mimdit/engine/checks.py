"""What the engine takes from a model: whether it can, and whether any of it changed."""

from typing import Any, cast

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import RMSNorm
from torch import nn

from mimdit.attention import MiMJointAttnProcessor
from mimdit.engine.step import EPS
from mimdit.quantized import ORDINARY
from mimdit.transformer import MiMDiTTransformer2DModel

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def check_model(model: MiMDiTTransformer2DModel) -> None:
    """ValueError where the engine would not compute what the model's own blocks do."""
    for name, processor in model.attn_processors.items():
        joint = name.endswith(".attn.processor")
        if joint and not isinstance(processor, MiMJointAttnProcessor):
            raise ValueError(f"{name}: expected this package's own, got {type(processor).__name__}")
    for name, part in model.named_modules():
        if name and hasattr(part, "_hf_hook"):
            raise ValueError(
                f"weights: expected all in one place, but accelerate moves {name} in and out (use "
                "model offload instead of sequential offload)"
            )
        if _hooked(part):
            raise ValueError(
                f"hooks: expected none of diffusers', but there are some on {name or 'the model'} "
                "(layerwise casting, group offload or a cache; first_block_cache is the engine's)"
            )
    for part in _attentions(model):
        for norm in (getattr(part, name, None) for name in _NORMS):
            plain = isinstance(norm, RMSNorm) and norm.weight is not None and norm.eps == EPS
            if norm is not None and not plain:
                found = type(norm).__name__
                raise ValueError(f"qk_norm: expected None or 'rms_norm', got {found}")


def state_of(model: MiMDiTTransformer2DModel, copies: bool) -> tuple[Any, ...]:
    """Changes when weights are moved or replaced, when LoRAs come, go or are rescaled, and when
    layers get another forward, hook or attention processor.

    copies: of weights are there, so also when these change in place.
    """
    found: list[Any] = []
    for part in model.modules():
        if hasattr(part, "scaling") and hasattr(part, "active_adapters"):
            found.append((str(part.scaling), str(part.active_adapters), part.merged))
        own = vars(part)
        hooks = [own["_forward_hooks"], own["_forward_pre_hooks"], own.get("forward")]
        # The model's own come and go with what moves it as a whole.
        if part is not model and any(hooks):
            found.append((id(part), *map(bool, hooks[:2]), hooks[2], _hooked(part)))
    for parameter in model.parameters():
        ordinary = type(parameter) in ORDINARY
        found.append(parameter.data_ptr() if ordinary else id(parameter))
        if copies:
            found.append(0 if parameter.is_inference() else parameter._version)
    return (*found, *(isinstance(p.processor, MiMJointAttnProcessor) for p in _joint(model)))


def _hooked(part: nn.Module) -> bool:
    """By a hook of diffusers, whose registry stays when the last has gone."""
    registry = vars(part).get("_diffusers_hook")
    return registry is not None and bool(registry.hooks)


def _joint(model: MiMDiTTransformer2DModel) -> list[Any]:
    return [cast(JointTransformerBlock, block).attn for block in model.transformer_blocks]


def _attentions(model: MiMDiTTransformer2DModel) -> list[nn.Module]:
    second = [cast(JointTransformerBlock, block).attn2 for block in model.transformer_blocks]
    return [*_joint(model), *(attn for attn in second if attn is not None)]
