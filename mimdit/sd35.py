"""New MiM-DiTs around the backbones of Stable Diffusion 3.5."""

import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors import SafetensorError, safe_open

from mimdit.errors import first_line
from mimdit.pipeline import MiMDiTPipeline
from mimdit.text import TEXT_COMPONENTS, encode_text
from mimdit.transformer import MiMDiTTransformer2DModel

POSITIVE = "a sharp, clean, richly detailed photograph in natural light and colours"
NEGATIVE = "blurry, noisy, hazy, rainy, underexposed, compressed, oversmoothed, distorted"
# Of SD3.5: 16 channels at an eighth of the resolution.
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def from_sd35(
    source: str | Path,
    *,
    text_encoders: str | Path | None = None,
    vae: str | Path | None = None,
    positive: str = POSITIVE,
    negative: str = NEGATIVE,
    keep_text_encoders: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> MiMDiTPipeline:
    """A new MiM-DiT: the backbone as it is, its mixtures of experts fresh, ready for training.

    Args:
        source: folder or hub id in diffusers layout, or one checkpoint file with the original
            names of tensors.
        text_encoders, vae: folder or hub id to take these from instead.
        positive, negative: texts whose embeddings are stored for guidance, next to the empty one.
        keep_text_encoders: keep them in the pipeline, for captions.
        dtype: of all weights. seed: of the fresh weights.
        options: `mim_dim`, `experts` and the other arguments of `MiMDiTTransformer2DModel`.

    The text encoders are loaded first and given up again; then the backbone's tensors are loaded
    once and taken over. Without text encoders a warning says that the embeddings are zeros.

    Raises:
        ValueError: source is not a complete SD3.5 checkpoint, in one sentence.
    """
    file = Path(source).is_file()
    if not file:
        _check_folder(source, vae)
    with tempfile.TemporaryDirectory() as folder:
        if file:
            config = _write_configs(Path(source), Path(folder))
        else:
            # A plain call of diffusers' `load_config` returns one dictionary.
            config = cast(
                dict[str, Any], SD3Transformer2DModel.load_config(source, subfolder="transformer")
            )
            if (found := config.get("_class_name")) != "SD3Transformer2DModel":
                raise ValueError(f"{source}: expected an SD3Transformer2DModel, got {found}")
        # Before anything large is loaded: wrong options fail here.
        with torch.device("meta"):
            layout = MiMDiTTransformer2DModel.from_config(config, **options)
        text_source = text_encoders or (None if file else source)
        text = _load_text_encoders(text_source, dtype) if text_source else {}
        if text_encoders and not text:
            raise ValueError(f"{text_encoders} holds no text encoders of SD3.5")
        prompts: dict[str, Any] = {"prompts": ("empty",)}
        if text:
            texts = ["", positive, negative]
            embeds, pooled = encode_text(text, layout, texts, torch.device("cpu"))
            prompts = {
                "prompts": ("empty", "positive", "negative"),
                "prompt_embeds": embeds,
                "pooled_prompt_embeds": pooled,
            }
        else:
            warnings.warn(
                "no text encoders found: the stored embeddings are zeros; name a folder that has "
                "them with text_encoders (--text-encoders)",
                stacklevel=2,
            )
        kept = text if keep_text_encoders else {}
        del text
        if file:
            backbone = _load_file(SD3Transformer2DModel, source, f"{folder}/transformer", dtype)
            codec = _single_file_vae(str(source), vae, f"{folder}/vae", dtype)
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            backbone = _load(SD3Transformer2DModel, source, "transformer", dtype)
            codec = _load(AutoencoderKL, vae or source, "vae", dtype)
            scheduler = cast(
                FlowMatchEulerDiscreteScheduler,
                FlowMatchEulerDiscreteScheduler.from_pretrained(source, subfolder="scheduler"),
            )
    model = MiMDiTTransformer2DModel.from_backbone(backbone, seed=seed, **prompts, **options)
    return MiMDiTPipeline(model, codec, scheduler, **kept)


def _check_folder(source: str | Path, vae: str | Path | None) -> None:
    """ValueError unless source is a hub id, or a folder with everything that is needed."""
    folder = Path(source)
    if not folder.is_dir():
        if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
            return
        raise ValueError(f"no such folder or file: {source}")
    needed = ["transformer/config.json", "scheduler/scheduler_config.json"]
    needed += [] if vae else ["vae/config.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not an SD3.5 folder in diffusers layout: {', '.join(missing)} missing"
        )


def _load(kind: Any, source: str | Path, subfolder: str, dtype: torch.dtype) -> Any:
    """One component, complete, without a second copy of its weights in memory."""
    try:
        model, info = kind.from_pretrained(
            source,
            subfolder=subfolder,
            dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {subfolder} cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        count = len(info["missing_keys"]) + len(info["mismatched_keys"])
        raise ValueError(f"{source}: {subfolder} is incomplete, {count} tensors do not fit")
    return model


def _load_text_encoders(source: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """Text components of a folder or hub id; without the third encoder where there is none."""
    folder = Path(source)
    absent = [n for n in TEXT_COMPONENTS if folder.is_dir() and not (folder / n).is_dir()]
    if "text_encoder" in absent:
        return {}
    try:
        from diffusers import StableDiffusion3Pipeline

        pipe = StableDiffusion3Pipeline.from_pretrained(
            source,
            **dict.fromkeys(["transformer", "vae", "scheduler", *absent]),
            dtype=dtype,
        )
    except ImportError as error:
        raise ValueError("text encoders need: pip install 'mimdit[sd35]'") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: the text encoders cannot be loaded: {first_line(error)}"
        ) from error
    return {name: getattr(pipe, name) for name in TEXT_COMPONENTS}


def _single_file_vae(
    file: str, vae: str | Path | None, config: str, dtype: torch.dtype
) -> AutoencoderKL:
    if vae:
        return _load(AutoencoderKL, vae, "vae", dtype)
    with safe_open(file, "pt") as tensors:
        if not any(name.startswith("first_stage_model.") for name in tensors.keys()):  # noqa: SIM118
            raise ValueError(f"{file} holds no VAE; name a folder that has one with vae (--vae)")
    return _load_file(AutoencoderKL, file, config, dtype)


def _load_file(kind: Any, file: str | Path, config: str, dtype: torch.dtype) -> Any:
    try:
        return kind.from_single_file(str(file), config=config, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{file}: the {kind.__name__} cannot be loaded: {first_line(error)}"
        ) from error


def _write_configs(file: Path, folder: Path) -> dict[str, Any]:
    """Diffusers configurations for a file of original SD3.5 tensors, read off their shapes."""
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a folder or a .safetensors file")
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            # Of text encoders in the file nothing is read.
            types = {
                part.get_dtype()
                for name, part in slices.items()
                if not name.startswith("text_encoders.")
            }
            shapes = {
                name.removeprefix("model.diffusion_model."): part.get_shape()
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file} is broken or incomplete: {error}") from error
    if unknown := types - {"F32", "F16", "BF16"}:
        raise ValueError(f"{file}: expected fp32, bf16 or fp16 weights, got {', '.join(unknown)}")
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("joint_blocks.")}
        dual = {int(n.split(".")[1]) for n in shapes if ".x_block.attn2." in n}
        config = {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
            "num_layers": len(blocks),
            "attention_head_dim": 64,
            "num_attention_heads": width // 64,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "caption_projection_dim": shapes["context_embedder.weight"][0],
            "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
            "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
            "dual_attention_layers": sorted(dual),
            "qk_norm": "rms_norm" if any("ln_q" in name for name in shapes) else None,
        }
    except KeyError as error:
        raise ValueError(f"{file} is not an SD3.5 checkpoint: {error} is missing") from None
    except (IndexError, ValueError):
        raise ValueError(f"{file} is not an SD3.5 checkpoint: tensors of other shapes") from None
    for name, content in (("transformer", config), ("vae", _VAE)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
    return config
