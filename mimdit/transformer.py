"""Diffusers' SD3 transformer, conditioned on a damaged picture by mixtures of experts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput

# Diffusers recognises the kind of a pipeline's component by this name in the component's module.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from mimdit import flow
from mimdit.attention import ImageAttnProcessor, KeyValueMiMProcessor, MiMJointAttnProcessor
from mimdit.condition import Accelerator, Condition
from mimdit.condition_embedder import ConditionEmbedder
from mimdit.dtypes import default_dtype
from mimdit.mim import MiM, Routing
from mimdit.patch_embed import ShiftablePatchEmbed
from mimdit.statistics import statistics_of, statistics_size
from mimkernels.autocast import no_autocast


class MiMDiTTransformer2DModel(SD3Transformer2DModel):
    """MiM-DiT (arXiv 2603.02710) on diffusers' `SD3Transformer2DModel`.

    The backbone keeps its modules and state-dict keys; `mim` holds the expert mixtures of all
    blocks. Arguments up to `qk_norm` are the backbone's, in latent units. The others:

        mim_dim … renormalize: see `MiM`.
        prediction_type, damage_std: see `flow.to_velocity`.
        pooled_condition: means and mean squares of the damaged picture's tokens join the pooled
            text, which modulates all blocks. For models without text.
        picture_statistics: with `pooled_condition`, those of `mimdit.statistics` join it, too. For
            latents of unshuffled pixels.
        prompts, prompt_tokens: names and length of the text embeddings stored with the weights, so
            that no text encoder is needed; the first is used when none is asked for.
    """

    pos_embed: ShiftablePatchEmbed
    # Set by `mimdit.accelerate`.
    engine: Accelerator | None = None

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        mim_dim: int = 384,
        groups: Sequence[str] = ("spatial", "channel", "swin", "se"),
        experts: int = 4,
        top_k: int = 2,
        inter: str = "dense",
        intra: str = "sparse",
        renormalize: bool = False,
        prediction_type: str = "velocity",
        damage_std: float = 0.4,
        pooled_condition: bool = False,
        picture_statistics: bool = False,
        prompts: Sequence[str] = ("empty",),
        prompt_tokens: int = 4,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=tuple(dual_attention_layers),
            qk_norm=qk_norm,
        )
        flow.check_prediction(prediction_type, damage_std, in_channels, out_channels)
        self.pos_embed.__class__ = ShiftablePatchEmbed
        self.mim = MiM(
            num_layers, self.inner_dim, mim_dim, groups, experts, top_k, inter, intra,
            renormalize, squares=pooled_condition,
        )  # fmt: skip
        self.condition_embedder: ConditionEmbedder | None = None
        self._reads_picture = pooled_condition and picture_statistics
        if pooled_condition:
            statistics = statistics_size(in_channels) if picture_statistics else 0
            self.condition_embedder = ConditionEmbedder(
                num_layers * mim_dim, pooled_projection_dim, statistics
            )
        tokens = torch.randn(len(prompts), prompt_tokens, joint_attention_dim) * 0.02
        self.prompt_embeds = nn.Parameter(tokens)
        self.pooled_prompt_embeds = nn.Parameter(torch.zeros(len(prompts), pooled_projection_dim))
        self.use_literal_attention(False)

    def use_literal_attention(self, literal: bool = True) -> None:
        """Choose Eq. 5 word for word, or (default) its exact form without the dropped queries."""
        processor = MiMJointAttnProcessor if literal else KeyValueMiMProcessor
        for layer, module in enumerate(self.transformer_blocks):
            block = cast(JointTransformerBlock, module)
            # Diffusers lists its own processors in the annotation, but takes any.
            block.attn.set_processor(processor(layer))  # pyright: ignore[reportArgumentType]
            if block.attn2 is not None:
                own = ImageAttnProcessor()
                block.attn2.set_processor(own)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_backbone(
        cls,
        backbone: SD3Transformer2DModel,
        prompts: Sequence[str] = ("empty",),
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        seed: int = 0,
        **options: Any,
    ) -> "MiMDiTTransformer2DModel":
        """A fresh MiM-DiT that takes over a backbone's tensors without copying them.

        prompt_embeds [N,T,C] and pooled_prompt_embeds [N,P] belong to the N names in `prompts`;
        zeros (of T = 1) by default. seed: of the mixtures' initial weights. options: `mim_dim`,
        `experts` and the other arguments of this class.
        """
        count, config = len(prompts), dict(backbone.config)
        if prompt_embeds is None:
            prompt_embeds = torch.zeros(count, 1, config["joint_attention_dim"])
        if pooled_prompt_embeds is None:
            pooled_prompt_embeds = torch.zeros(count, config["pooled_projection_dim"])
        known = {k: v for k, v in config.items() if not k.startswith("_")}
        stored = {"prompts": tuple(prompts), "prompt_tokens": prompt_embeds.shape[1]}
        with torch.device("meta"):
            model = cls(**(known | stored | options))
        model.load_state_dict(backbone.state_dict(), strict=False, assign=True)
        with torch.random.fork_rng(devices=()), default_dtype(backbone.dtype):
            torch.default_generator.manual_seed(seed)
            model.mim = MiM(**model.mim.settings)
        for name in ("inter_router", "intra_router", "running_mean", "running_steps"):
            # They decide discretely, and move in small steps.
            tensor = getattr(model.mim, name)
            tensor.data = tensor.data.float()
        for name, value in (
            ("prompt_embeds", prompt_embeds),
            ("pooled_prompt_embeds", pooled_prompt_embeds),
        ):
            own = getattr(model, name)
            if value.shape != own.shape:
                raise ValueError(f"{name}: expected {[*own.shape]}, got {[*value.shape]}")
            setattr(model, name, nn.Parameter(value.to("cpu", backbone.dtype, copy=True)))
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing:
            raise ValueError(f"backbone: {len(missing)} tensors are missing ({missing[0]}, …)")
        device = next(backbone.parameters()).device
        return model.to(device).eval()  # pyright: ignore[reportArgumentType]

    @contextmanager
    def position_offset(self, top: int, left: int) -> Iterator[None]:
        """Take positions from this corner of the table, in tokens, instead of from its centre.

        Routing and pooled conditions still come from the centre: the place moves the token means
        as far as noise or blur do.
        """
        with self.pos_embed.at((top, left)):
            yield

    def prompt(self, name: str | None = None, batch: int = 1) -> tuple[Tensor, Tensor]:
        """Stored text embeddings [B,T,C] and pooled ones [B,P]."""
        names = list(self.config["prompts"])
        if name is not None and name not in names:
            raise ValueError(f"prompt: expected one of {', '.join(names)}, got {name!r}")
        i = names.index(name) if name else 0
        return (
            self.prompt_embeds[i].expand(batch, -1, -1),
            self.pooled_prompt_embeds[i].expand(batch, -1),
        )

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Tokens along height and width."""
        patch = self.config["patch_size"]
        height, width = latents.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(
                f"latents: expected height and width to be multiples of {patch}, "
                f"got {height}×{width}"
            )
        return height // patch, width // patch

    @apply_forward_hook
    def pool_condition(self, lq_latents: Tensor) -> Tensor:
        """Means [L,B,d, 2d or 2d+S] to average over tiles, then for `mim.route`."""
        pooled = self.mim.pool(self._embed(lq_latents, centred=True))
        if not self._reads_picture:
            return pooled
        found = statistics_of(lq_latents).to(pooled)
        return torch.cat([pooled, found.expand(len(pooled), -1, -1)], dim=-1)

    @apply_forward_hook
    def encode_condition(self, lq_latents: Tensor, routing: Routing | None = None) -> Condition:
        """m_l = ZeroLinear_l(MiM_l(PatchEmbed(z_lq) + pos)) for every block; z_lq [B,c,h,w]."""
        engine = None if torch.is_grad_enabled() else self.engine
        mim = self.mim if engine is None else engine.mixtures
        found = self._encode(lq_latents, routing, mim)
        return found if engine is None else engine.condition(found)

    def _encode(
        self, lq_latents: Tensor, routing: Routing | None, mim: Callable[..., Any]
    ) -> Condition:
        grid = self.grid(lq_latents)
        # Where the mixtures' own means would not do.
        if routing is None and (self._reads_picture or self.pos_embed.offset is not None):
            pooled = self.pool_condition(lq_latents)
            if self.mim.training:
                self.mim.track(self.mim.means(pooled).mean(1), slice(None))
            routing = self.mim.route(pooled)
        z = self._embed(lq_latents)
        out = [mim(z, grid, layers, routing) for layers in self.mim.chunks(z)]
        tokens = tuple(m for part, _ in out for m in part.unbind())
        return Condition(lq_latents, tokens, Routing.cat([chosen for _, chosen in out]))

    def _embed(self, lq_latents: Tensor, centred: bool = False) -> Tensor:
        """PatchEmbed(z_lq) + pos, [B,K,D]; centred: whatever `position_offset` says."""
        # Cast last: on the scale of pixels bfloat16 would merge dark tones.
        seen = flow.observed(self.config["prediction_type"], lq_latents).to(self.dtype)
        with self.pos_embed.at(None if centred else self.pos_embed.offset):
            return self.pos_embed(seen).contiguous()

    def predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        condition: Condition | None = None,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """The network alone: from `flow.network_input` to the raw output of `flow.to_velocity`."""
        if encoder_hidden_states is None or pooled_projections is None:
            stored = self.prompt(batch=hidden_states.shape[0])
            encoder_hidden_states = (
                stored[0] if encoder_hidden_states is None else encoder_hidden_states
            )
            pooled_projections = stored[1] if pooled_projections is None else pooled_projections
        kwargs = dict(joint_attention_kwargs or {})
        text = encoder_hidden_states.to(hidden_states.dtype)
        pooled = pooled_projections.to(hidden_states.dtype)
        if condition is not None and self.condition_embedder is not None:
            pooled = pooled + self.condition_embedder(condition.routing.pooled).to(pooled.dtype)
        if self.engine is not None and not torch.is_grad_enabled() and not kwargs:
            return self.engine.predict(hidden_states, timestep, condition, text, pooled)
        if condition is not None:
            if not condition.tokens and self.engine is not None and not torch.is_grad_enabled():
                # An engine keeps keys and values of the tokens, which its own steps alone read.
                mim = self.engine.mixtures
                condition = self._encode(condition.latents, condition.routing, mim)
            if not condition.tokens:
                raise ValueError(
                    "condition: expected one that this model encoded as it is now, got one of the "
                    "accelerated model"
                )
            kwargs["condition"] = condition.tokens
        return super().forward(
            hidden_states,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            # Diffusers declares LongTensor, but only embeds the value.
            timestep=timestep,  # pyright: ignore[reportArgumentType]
            joint_attention_kwargs=kwargs,
            return_dict=False,
        )[0]

    # Unlike the backbone's, text is optional here and the condition comes before it.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        condition: Condition | None = None,
        *,
        lq_latents: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity of the flow at x_t.

        Args:
            hidden_states: x_t [B,c,h,w]. timestep: 1000·t, [B].
            condition: of `encode_condition`; reuse it over steps. lq_latents: the damaged latents,
                encoded in this call instead. Neither: the bare backbone.
            encoder_hidden_states [B,T,C], pooled_projections [B,P]: text; default the stored
                prompt.
        """
        if condition is None and lq_latents is not None:
            condition = self.encode_condition(lq_latents)
        kind = self.config["prediction_type"]
        if condition is None and flow.reads_damage(kind):
            raise ValueError(f"condition: prediction type {kind!r} needs the damaged picture")
        lq = hidden_states if condition is None else condition.latents
        t, std = timestep.to(hidden_states.dtype) / 1000, self.config["damage_std"]
        output = self.predict(
            flow.network_input(kind, hidden_states, t, lq, std).to(self.dtype),
            timestep,
            condition,
            encoder_hidden_states,
            pooled_projections,
            joint_attention_kwargs,
        )
        # Autocast, where it is on, would round pictures to bfloat16.
        with no_autocast(hidden_states.device.type):
            v = flow.to_velocity(kind, output.to(hidden_states.dtype), hidden_states, t, lq, std)
        return Transformer2DModelOutput(sample=v) if return_dict else (v,)

    @torch.no_grad()
    def randomize_(self, seed: int = 0) -> "MiMDiTTransformer2DModel":
        """Draw what starts at zero or one, for equality tests.

        That is ZeroLinear, routers, biases, tables, and the embedding of pooled conditions. A fresh
        model hides faults: its conditioning is zero and its routers are nearly uniform.
        """
        generator = torch.Generator().manual_seed(seed)
        self.mim.randomize_(generator)
        if self.condition_embedder is not None:
            for tensor in self.condition_embedder.parameters():
                noise = torch.randn(tensor.shape, generator=generator, device="cpu")
                tensor.copy_(noise * 0.1)
        return self
