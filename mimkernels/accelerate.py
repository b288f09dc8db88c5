"""`accelerate`: layers inside other people's models get forward passes on this package's ops.

A layer stays the object that it was, with its parameters, hooks and state dict; only its class
becomes a subclass of its own one, as `torch.nn.utils.parametrize` and FSDP2 do. Names and shapes
tell which layers come into question. Copies with the same names and another formula are common, so
a randomised copy of each layer is tried first, before and after, on the CPU.
"""

import copy
import copyreg
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mimkernels.backend import use_backend
from mimkernels.nn import ChannelAttention, SqueezeExcite, WindowAttention
from mimkernels.nn.recognise import FAMILIES, Family

# Of a trial in float32, relative to the largest output: formulas differ by far more.
_TOLERANCE = 1e-4
_SHOWN = 3


@dataclass(frozen=True)
class Replaced:
    """A layer's name in the model, its class, the op it runs on, and when it does not, or ""."""

    name: str
    layer: str
    op: str
    note: str = ""


@dataclass(frozen=True)
class Left:
    """A layer that looked like one of those replaced, and why it was left."""

    name: str
    layer: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; printed, layers with equal fates share a line."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    _layers: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    def undo(self) -> None:
        """The layers run their own code again, as they did before."""
        for layer in self._layers:
            restore(layer)

    def __str__(self) -> str:
        lines = [f"mimkernels.accelerate: {len(self.replaced)} replaced, {len(self.left)} left"]
        done = ((e.name, f"{e.layer} → {e.op}", e.note) for e in self.replaced)
        kept = ((e.name, f"{e.layer} left", e.reason) for e in self.left)
        return "\n".join([*lines, *_grouped(done), *_grouped(kept)])


def accelerate(module: nn.Module, *, trial: bool = True) -> Report:
    """Replace, in place, the forward passes of the layers that an op of this package can stand for.

    These are timm's and torchvision's Swin V1 blocks and attention, attention with the attributes
    of Restormer's, and squeeze-and-excitation as in torchvision and timm. Outputs stay equal within
    rounding; parameters, optimisers, state dict keys and `isinstance` are as before. Accelerate
    before wrapping (FSDP, `torch.jit`) and before adding hooks: those on modules inside a replaced
    attention may no longer run. Layers decide anew at every call: what their kernel lacks (dropout
    of attention in training, a window that changed) runs in their own code. Devices without kernels
    get the torch references.

    Args:
        module: a model or a single layer.
        trial: compare a randomised float32 copy of each layer with its replacement, on the CPU, and
            leave it if they differ. Without it names and shapes are believed.

    Returns:
        A `Report` of what was replaced and what was left; `report.undo()` takes it back, and so
        does `mimkernels.restore(module)`.
    """
    replaced, left = [], []
    chosen: list[tuple[nn.Module, Family]] = []
    inner: set[int] = set()
    results: dict[str, str | None] = {}
    for name, layer in list(module.named_modules()):
        family = next((f for f in FAMILIES.values() if f.looks_like(layer)), None)
        if family is None or id(layer) in inner:
            continue
        core = family.core(layer)
        if core is not layer:
            inner.add(id(core))
        reason = _obstacle(family, layer)
        if reason is None and trial:
            key = _fingerprint(layer)
            if key not in results:
                results[key] = _tried(family, layer)
            reason = results[key]
        kind, name = type(layer).__name__, name or "(the module itself)"
        if reason is None:
            replaced.append(Replaced(name, kind, family.op, family.note(layer)))
            chosen.append((layer, family))
        else:
            left.append(Left(name, kind, reason))
    for layer, family in chosen:
        layer.__class__ = _faster(type(layer), family.name)
    return Report(tuple(replaced), tuple(left), tuple(layer for layer, _ in chosen))


def restore(module: nn.Module) -> None:
    """Take back what `accelerate` did to any layer of a module, also in a copy of it.

    Raises:
        ValueError: something else changed the class of a layer since (FSDP, say).
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, _Accelerated):
            continue
        if "_accelerated_from" not in vars(type(layer)):
            found = type(layer).__name__
            raise ValueError(f"{name}: expected the class that accelerate gave it, got {found}")
        layer.__class__ = layer._accelerated_from


class _Accelerated:
    """In front of a layer's own class, in the subclass that `_faster` makes."""

    _accelerated_from: ClassVar[type[Any]]
    _accelerated_as: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles name classes, and this one has no name that can be imported."""
        how, *rest = super().__reduce_ex__(protocol)  # pyright: ignore[reportGeneralTypeIssues]
        if how is not copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue]
            return (how, *rest)
        return (_new, (self._accelerated_from, self._accelerated_as), *rest[1:])


@cache
def _faster(original: type[Any], family: str) -> type[Any]:
    """A subclass of a layer's class whose forward pass runs on an op."""
    known = FAMILIES[family]
    names = {
        known.method: known.fast,
        "_accelerated_from": original,
        "_accelerated_as": family,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(f"Accelerated{original.__name__}", (_Accelerated, original), names)


def _new(original: type[Any], family: str) -> Any:
    return object.__new__(_faster(original, family))


def _obstacle(family: Family, layer: Any) -> str | None:
    """Why a layer cannot be replaced, as far as one sees without running it."""
    core = family.core(layer)
    if isinstance(layer, (_Accelerated, WindowAttention, ChannelAttention, SqueezeExcite)):
        return "it runs on this package's ops already"
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is compiled TorchScript"
    if family.method in vars(layer) or "forward" in vars(core):
        return "its forward pass was replaced on the instance"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(m, name) for m in core.modules() if m is not layer for name in hooks):
        return "there are hooks on modules inside it"
    return family.obstacle(layer)


def _tried(family: Family, layer: nn.Module) -> str | None:
    """Compare a randomised copy's own output with that on the op; None if they agree."""
    if any(v.is_meta for v in (*layer.parameters(), *layer.buffers())):
        return "its weights are on the meta device, so it cannot be tried"
    g = torch.Generator().manual_seed(0)
    # Other people's code may fail in any way.
    try:
        twin = copy.deepcopy(layer).to("cpu", torch.float32)
        original = type(twin)
        for p in twin.parameters():
            # Logits and outputs of about 1: zeros, as of fresh layers, would hide differences.
            scale = max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else 1.0
            p.data = scale * torch.randn(p.shape, generator=g, dtype=p.dtype, device="cpu")
        x = torch.randn(family.sample(layer), generator=g, dtype=torch.float32, device="cpu")
        if family.channels_first:
            x = x.contiguous(memory_format=torch.channels_last)
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=()),
            use_backend("torch"),
        ):
            for mode in family.modes:
                twin.train(mode)
                twin.__class__ = original
                theirs: Tensor = getattr(twin, family.method)(x)
                twin.__class__ = _faster(original, family.name)
                ours: Tensor = getattr(twin, family.method)(x)
                room = _TOLERANCE * float(theirs.abs().max())
                if ours.shape != theirs.shape or not torch.allclose(ours, theirs, 0, room):
                    return f"its output is not that of {family.formula}"
    except Exception as error:
        return f"a trial of it failed: {type(error).__name__}: {error}"
    return None


def _fingerprint(layer: nn.Module) -> str:
    """Equal for layers whose trials would be the same."""
    plain = (bool, int, float, str, tuple, list)
    parts = []
    for part in layer.modules():
        settings = {k: v for k, v in vars(part).items() if k[0] != "_" and isinstance(v, plain)}
        parts.append((id(type(part)), settings))
    return repr((parts, [(n, tuple(p.shape)) for n, p in layer.named_parameters()]))


def _grouped(entries: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines of (name, what, remark), those alike in one."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, what, remark in entries:
        names.setdefault((what, remark), []).append(name)
    lines = []
    for (what, remark), found in names.items():
        shown = found if len(found) <= _SHOWN else [*found[: _SHOWN - 1], "…", found[-1]]
        remark = f" ({remark})" if remark else ""
        lines.append(f"  {len(found)} × {what}{remark}: {', '.join(shown)}")
    return lines
