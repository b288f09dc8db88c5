"""One training step: the losses, and the module whose forward pass gives them."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from mimdit import flow
from mimdit.mim import Routing
from mimdit.transformer import MiMDiTTransformer2DModel

# An error that is hardly worth reducing: about 41 dB.
_NEGLIGIBLE = 2e-3


def flow_loss(
    model: MiMDiTTransformer2DModel,
    x0: Tensor,
    z_lq: Tensor,
    t: Tensor,
    noise: Tensor,
    cuts: int = 1,
    weighting: str = "none",
) -> tuple[Tensor, Routing]:
    """Velocity error, and the routing taken; x0, z_lq, noise [B,c,h,w], t [B].

    cuts: parts that each side is cut into; the tiles share the routing of their picture, as those
    of large pictures do. weighting: "sigma_squared" weighs with t², which makes the error of the
    velocity that of x0.

    The error's weighted mean; for models that predict from the damaged latents the mean of its
    logarithm, which is the mean PSNR of what they predict: darkness and haze, with errors that are
    larger by far and can never be small, then do not drown noise and rain.
    """
    routing = shared = None
    if cuts > 1:
        x0, z_lq, noise = (_tiles(latents, cuts) for latents in (x0, z_lq, noise))
        pooled = model.pool_condition(z_lq).unflatten(1, (cuts**2, -1)).mean(1)
        routing = model.mim.route(pooled)
        shared, t = routing.repeat(cuts**2), t.repeat(cuts**2)
    x_t = flow.interpolate(x0, noise, t)
    condition = model.encode_condition(z_lq, shared)
    v = model(x_t, 1000 * t, condition).sample
    wide = torch.promote_types(v.dtype, torch.float32)
    error = (v.to(wide) - (noise - x0)).square().mean(dim=(1, 2, 3))
    kind = model.config["prediction_type"]
    error = flow.loss_weight(kind, t, model.config["damage_std"]) * error
    if weighting == "sigma_squared":
        error = t**2 * error
    if flow.reads_damage(kind):
        error = (error + _NEGLIGIBLE).log()
    return error.mean(), condition.routing if routing is None else routing


def _tiles(latents: Tensor, cuts: int) -> Tensor:
    """[B,c,n·h,n·w] → [n²·B,c,h,w], tile by tile."""
    return rearrange(latents, "b c (i h) (j w) -> (i j b) c h w", i=cuts, j=cuts)


def picks_of(routing: Routing, experts: int) -> Tensor:
    """How often each sub-expert was chosen, [L,B,G,E]."""
    return torch.nn.functional.one_hot(routing.index, experts).sum(-2)


def balance_loss(
    model: MiMDiTTransformer2DModel,
    pooled: Tensor,
    picks: Tensor,
    over_all: Callable[[Tensor], Tensor] = lambda share: share,
) -> Tensor:
    """Switch Transformer's load balance (arXiv 2101.03961, Eq. 4) over all routers; 1 is even.

    pooled: of a `Routing`. picks [L,B,G,E]. over_all: their mean over all processes.
    """
    mim = model.mim
    p = torch.einsum("lbd,lged->lbge", mim.means(pooled), mim.intra_router)
    share = over_all(picks.to(p.dtype).mean(1) / mim.top_k)
    return mim.experts * (p.softmax(-1).mean(1) * share).sum(-1).mean()


class FlowStep(nn.Module):
    """The loss of a batch of latents as one forward pass, to be wrapped for many processes.

    balance: weight of `balance_loss`. bf16: autocast. over_all: see `balance_loss`. weighting: of
    `flow_loss`.
    """

    def __init__(
        self,
        model: MiMDiTTransformer2DModel,
        balance: float,
        bf16: bool,
        over_all: Callable[[Tensor], Tensor],
        weighting: str = "none",
    ) -> None:
        super().__init__()
        self.model, self.balance, self.bf16 = model, balance, bf16
        self.over_all, self.weighting = over_all, weighting

    def train(self, mode: bool = True) -> "FlowStep":
        super().train(mode)
        # In training mode MiM follows the mean of every pass of its own process; `follow_mean_`
        # does so once a step, by the pictures of all of them.
        self.model.mim.eval()
        return self

    def forward(
        self,
        x0: Tensor,
        z_lq: Tensor,
        t: Tensor,
        noise: Tensor,
        top: int,
        left: int,
        cuts: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, inter weights [L,B,G], picks [L,B,G,E], and the centred mean tokens [L,d].

        top, left: of `draw_place`. cuts: of `flow_loss`.
        """
        with (
            self.model.position_offset(top, left),
            torch.autocast(x0.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            loss, routing = flow_loss(self.model, x0, z_lq, t, noise, cuts, self.weighting)
            picks = picks_of(routing, self.model.mim.experts)
            if self.balance:
                balance = balance_loss(self.model, routing.pooled, picks, self.over_all)
                loss = loss + self.balance * balance
        centred = self.model.mim.means(routing.pooled.detach()).mean(1)
        return loss, routing.inter.detach(), picks, centred


def follow_mean_(model: MiMDiTTransformer2DModel, centred: Tensor) -> None:
    """Let the routers' running means follow a step's centred mean tokens [L,d]."""
    mim = model.mim
    mim.track(mim.running_mean + centred, slice(None))
