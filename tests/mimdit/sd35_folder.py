"""Small Stable Diffusion 3.5 folders, written by diffusers and transformers themselves."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

# Width 128: two heads of 64, as all of SD3.5 has.
LAYOUTS: dict[str, dict[str, Any]] = {
    "medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "large": {"dual_attention_layers": (), "qk_norm": "rms_norm"},
    "plain": {"dual_attention_layers": (), "qk_norm": None},
}


def backbone(layout: str = "medium", seed: int = 0) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=16,
        num_layers=3,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=64,
        pos_embed_max_size=24,
        **LAYOUTS[layout],
    )
    # Fresh norms of queries and keys are all ones.
    for name, p in model.named_parameters():
        if "norm_" in name:
            p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=16,
        sample_size=128,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def text_components(t5: bool = True) -> dict[str, Any]:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    letters = [chr(c) for c in range(97, 123)] + [","]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(vocab) - 2,
        eos_token_id=len(vocab) - 1,
        pad_token_id=len(vocab) - 1,
    )
    parts: dict[str, Any] = {}
    for i, suffix in enumerate(("", "_2")):
        torch.manual_seed(i)
        parts[f"text_encoder{suffix}"] = CLIPTextModelWithProjection(config).eval()
        parts[f"tokenizer{suffix}"] = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    parts |= {"text_encoder_3": None, "tokenizer_3": None}
    if t5:
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
        pieces += [(letter, -2.0) for letter in letters]
        torch.manual_seed(3)
        parts["tokenizer_3"] = T5TokenizerFast(vocab=pieces, extra_ids=0)
        parts["text_encoder_3"] = T5EncoderModel(
            T5Config(
                vocab_size=len(pieces), d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2
            )
        ).eval()
    return parts


def write_folder(
    folder: Path, layout: str = "medium", text: dict[str, Any] | None = None, **save: Any
) -> StableDiffusion3Pipeline:
    """Write the folder and return the pipeline it holds; `save` goes to `save_pretrained`."""
    parts = text or dict.fromkeys(text_components(t5=False))
    pipe = StableDiffusion3Pipeline(
        transformer=backbone(layout),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    )
    pipe.save_pretrained(folder, **save)
    return pipe


def original_names(model: SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    """The tensors under the names of Stability's own checkpoints."""
    own = model.state_dict()
    out: dict[str, torch.Tensor] = {}
    pairs = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    names = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    fused = {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    }

    def put(target: str, sources: tuple[str, ...], swap: bool = False) -> None:
        for end in ("", ".weight", ".bias"):
            if sources[0] + end in own:
                tensor = torch.cat([own[source + end] for source in sources])
                # The final modulation stores shift before scale, diffusers the reverse.
                out[target + end] = torch.cat(tensor.chunk(2)[::-1]) if swap else tensor

    for source, target in pairs.items():
        put(target, (source,))
    put("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)
    for i in range(len(model.transformer_blocks)):
        there, here = f"joint_blocks.{i}.", f"transformer_blocks.{i}."
        for source, target in names.items():
            put(there + target, (here + source,))
        for target, sources in fused.items():
            put(there + target, tuple(here + source for source in sources))
    # So does the text branch of the last block.
    last = len(model.transformer_blocks) - 1
    put(
        f"joint_blocks.{last}.context_block.adaLN_modulation.1",
        (f"transformer_blocks.{last}.norm1_context.linear",),
        swap=True,
    )
    return {f"model.diffusion_model.{name}": t.contiguous() for name, t in out.items()}
