"""Pipelines by name, folder or hub id."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mimdit.codec import PixelCodec
from mimdit.pipeline import MiMDiTPipeline
from mimdit.transformer import MiMDiTTransformer2DModel
from mimdit.vetting import check_folder

# Folders of trained models that come with the package.
WEIGHTS = Path(__file__).parent / "weights"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assemble(
    transformer: MiMDiTTransformer2DModel, default_steps: int = 40, default_shifts: int = 1
) -> MiMDiTPipeline:
    """A pipeline around a pixel-codec transformer."""
    codec = PixelCodec(factor=int((transformer.config["in_channels"] // 3) ** 0.5))
    return MiMDiTPipeline(
        transformer,
        codec,
        FlowMatchEulerDiscreteScheduler(),
        default_steps=default_steps,
        default_shifts=default_shifts,
    )


def shipped() -> set[str]:
    """Names of the models that come with the package; they go before folders of the same name."""
    return {p.name for p in WEIGHTS.iterdir() if p.is_dir()} if WEIGHTS.is_dir() else set()


def load_pipeline(model: str, device: str = "cpu", precision: str | None = None) -> MiMDiTPipeline:
    """A pipeline by the name of a shipped model, by folder, or by hub id.

    precision: "fp32" (default), "bf16" or "fp16". Raises ValueError or OSError in one sentence.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: expected bf16, fp16 or fp32, got {precision!r}")
    ours = shipped()
    folder = str(WEIGHTS / model) if model in ours else model
    if model not in ours and not Path(model).is_dir() and model.count("/") != 1:
        names = ", ".join([*sorted(ours), "a folder", "or a hub id"])
        raise ValueError(f"no such model folder; expected {names}")
    if Path(folder).is_dir() and not (Path(folder) / "model_index.json").is_file():
        raise ValueError("not a model folder, it has no model_index.json")
    if Path(folder).is_dir():
        check_folder(Path(folder))
    options: dict[str, Any] = {"dtype": PRECISIONS[precision or "fp32"], "use_safetensors": True}
    # With `output_loading_info` diffusers returns a pair, which its annotation leaves out.
    transformer, info = MiMDiTTransformer2DModel.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        folder, subfolder="transformer", output_loading_info=True, **options
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        raise ValueError(
            f"not the weights of this model: {len(wrong)} tensors differ ({wrong[0]}, …)"
        )
    pipe = MiMDiTPipeline.from_pretrained(folder, transformer=transformer, **options)
    return pipe.to(device)
