"""An exported folder restores pictures: its graphs and `mimdit`'s tiles, without its model.

The graphs run in ONNX Runtime, or as engines in TensorRT or TensorRT-RTX.
Torch serves as the array library: tiles, colours and noise are the pipeline's own, so equal seeds
give equal pictures. Neither diffusers nor a module of the network is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from export.backends import open_graphs
from export.libraries import ExportError
from export.manifest import verify
from export.sessions import AnySession
from mimdit.color import color_fix
from mimdit.inputs import Pictures, to_tensor
from mimdit.options import check_options, grid_places
from mimdit.tile_loop import TileLoop, pool_tiles
from mimdit.tiling import Tiling, plan_tiles, reflect_pad

# Conditioning tokens beyond this many bytes are computed anew in every step instead of kept.
_CONDITION_BYTES = 2**30


@dataclass(frozen=True)
class Routing:
    """What the routers chose: inter [L,B,G], intra and index [L,B,G,k]."""

    inter: np.ndarray
    intra: np.ndarray
    index: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Nested lists, for JSON."""
        return {name: getattr(self, name).tolist() for name in ("inter", "intra", "index")}


class Restored(NamedTuple):
    """images: float32 [B,H,W,3] in [0,1]; the routing taken."""

    images: np.ndarray
    routing: Routing


@dataclass(frozen=True)
class _Inputs:
    """What the denoiser reads of the damaged tiles of a pass, where it runs."""

    named: dict[str, Any]
    bytes: int


def _denoiser(
    graphs: Mapping[str, AnySession],
    z_lq: Tensor,
    tiling: Tiling,
    prompts: Sequence[tuple[Tensor, Tensor]],
    guidance_scale: float,
    tile_batch: int,
    shared: bool,
) -> tuple[TileLoop[_Inputs], dict[int, tuple[np.ndarray, ...]]]:
    """The graphs as a `TileLoop`; and inter [L,G], intra and index [L,G,k] that they will choose.

    The latter by picture, or where the routing is not shared by tile and picture.
    """

    def pool(z_lq: Tensor) -> Tensor:
        return torch.from_numpy(graphs["pool"](z_lq=z_lq)["means"])

    def encode(z_lq: Tensor, rows: Tensor) -> _Inputs:
        out = graphs["conditioner"](z_lq=z_lq, means=means[:, rows].numpy())
        for place, row in enumerate(rows.tolist()):
            chosen[row] = tuple(out[name][:, place] for name in ("inter", "intra", "index"))
        resident = graphs["denoiser"].resident
        named = {name: resident(out[name]) for name in ("tokens", "pooled")}
        return _Inputs({"z_lq": z_lq, **named}, out["tokens"].nbytes)

    def velocities(x: Tensor, t: Tensor, condition: _Inputs) -> list[Tensor]:
        found = (
            graphs["denoiser"](
                x_t=x,
                timestep=t.contiguous(),
                **condition.named,
                text=text.expand(len(x), -1, -1),
                pooled_text=pooled.expand(len(x), -1),
            )
            for text, pooled in prompts
        )
        return [torch.from_numpy(out["velocity"]) for out in found]

    parts = (z_lq, tiling, tile_batch)
    means = pool_tiles(pool, *parts, shared=shared)
    chosen: dict[int, tuple[np.ndarray, ...]] = {}
    options: dict[str, Any] = {"shared": shared, "keep": _CONDITION_BYTES}
    return TileLoop(*parts, encode, velocities, guidance_scale, **options), chosen


def _routing(chosen: Mapping[int, tuple[np.ndarray, ...]]) -> Routing:
    columns = (chosen[row] for row in sorted(chosen))
    return Routing(*(np.stack(parts, axis=1) for parts in zip(*columns, strict=True)))


class ExportedPipeline:
    """Restores pictures with an exported folder; called as `mimdit.MiMDiTPipeline` is.

    Args:
        folder: of `mimdit-export`. device: "cpu", "cuda" or "auto". threads: 0 for all cores.
        runtime: "onnxruntime", "tensorrt", "tensorrt_rtx", or "auto": engines of the folder where
            they fit the GPU, else ONNX Runtime.

    Raises:
        ExportError: the folder is not whole, or it cannot run here.
    """

    def __init__(
        self, folder: Path | str, device: str = "auto", threads: int = 0, runtime: str = "auto"
    ) -> None:
        folder = Path(folder)
        self.manifest = verify(folder)
        if self.manifest["parity"] == "failed":
            raise ExportError(f"{folder}: parity: expected passed, got failed; see parity.json")
        self.settings: dict[str, Any] = self.manifest["runtime"]
        self.limits: dict[str, list[int]] = self.manifest["limits"]
        self.runtime, self.graphs = open_graphs(folder, self.manifest, device, threads, runtime)
        with np.load(folder / "prompts.npz") as file:
            self._text = {
                name: (
                    torch.from_numpy(file["text"][i : i + 1]),
                    torch.from_numpy(file["pooled_text"][i : i + 1]),
                )
                for i, name in enumerate(self.settings["prompts"])
            }
        self._progress: dict[str, Any] = {}

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm, such as disable=True."""
        self._progress = options

    def __call__(
        self,
        image: Pictures,
        num_inference_steps: int | None = None,
        shifts: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        strength: float = 1.0,
        color_fix: str = "none",
        tile: int = 0,
        tile_overlap: int = 64,
        tile_batch: int | None = None,
        routing: str = "picture",
        experts: Mapping[str, float] | None = None,
        output_type: str = "np",
    ) -> Restored:
        """Restore one picture or a batch of equal size; arguments as the pipeline's.

        Those that an exported folder cannot follow must be left out: captions, which need text
        encoders, and weights of experts, whose routers are inside the graphs.

        Noise is drawn on the CPU from `generator`, one draw of the latents' shape for each shifted
        grid, as the pipeline draws it.

        Raises:
            ValueError: an argument out of range, or a result that is not finite.
        """
        settings = self.settings
        steps = settings["default_steps"] if num_inference_steps is None else num_inference_steps
        if num_inference_steps is None and shifts is None:
            shifts = settings["default_shifts"]
        shifts = 1 if shifts is None else shifts
        if output_type != "np":
            raise ValueError(f"output_type: expected np, got {output_type!r}")
        check_options(
            steps, shifts, strength, color_fix, tile, tile_overlap, tile_batch, routing, output_type
        )
        if experts:
            raise ValueError(f"experts: expected none for an exported folder, got {experts}")
        damaged = to_tensor(image)
        height, width = damaged.shape[-2:]
        if not 1 <= len(damaged) <= self.limits["batch"][1]:
            most = self.limits["batch"][1]
            raise ValueError(f"image: expected 1 to {most} pictures at once, got {len(damaged)}")
        prompts = self._prompts(guidance_scale)
        sigmas = euler_sigmas(settings["scheduler"], steps)
        places = grid_places(shifts, settings["factor"] * settings["patch_size"])
        images, taken = torch.zeros_like(damaged), None
        with tqdm(total=steps * len(places), **self._progress) as bar:
            for top, left in places:
                moved = reflect_pad(damaged, height + top, width + left, top, left)
                z_lq = self._encode(moved)
                tiling = self._tiling((z_lq.shape[-2], z_lq.shape[-1]), tile, tile_overlap)
                most = max(1, self.limits["batch"][1] // len(damaged))
                batch = tiling.even(min(tile_batch or 1, most))
                shared = routing == "picture"
                velocity, chosen = _denoiser(
                    self.graphs, z_lq, tiling, prompts, guidance_scale, batch, shared
                )
                latents = torch.randn(z_lq.shape, generator=generator)
                for now, then in pairwise(sigmas):
                    time = torch.tensor(float(now * settings["scheduler"]["train_steps"]))
                    latents = latents + float(then - now) * velocity(latents, time)
                    bar.update()
                taken = _routing(chosen) if taken is None else taken
                pixels = self._decode(latents) / 2 + 0.5
                images += pixels[..., top : top + height, left : left + width] / len(places)
        assert taken is not None
        return Restored(_finish(images, damaged, strength, color_fix), taken)

    def _prompts(self, scale: float) -> list[tuple[Tensor, Tensor]]:
        """Stored text of the one branch, or of the positive and the negative one."""
        if scale == 1:
            return [next(iter(self._text.values()))]
        if not {"positive", "negative"} <= set(self._text):
            raise ValueError(f"guidance_scale: expected 1, no two prompts are stored; got {scale}")
        branches = [self._text["positive"], self._text["negative"]]
        if all(torch.equal(p, n) for p, n in zip(*branches, strict=True)):
            raise ValueError(f"guidance_scale: expected 1, the prompts are equal; got {scale}")
        return branches

    def _encode(self, damaged: Tensor) -> Tensor:
        """Latents of pictures padded to whole patches."""
        settings, (low, _) = self.settings, self.limits["side"]
        patch = settings["factor"] * settings["patch_size"]
        least = max(settings["min_tokens"], low)
        padded = [max(-(-n // patch), least) * patch for n in damaged.shape[-2:]]
        pictures = reflect_pad(damaged, *padded) * 2 - 1
        if settings["codec"] == "pixel":
            return F.pixel_unshuffle(pictures, settings["factor"])
        if max(padded) > settings["largest"]:
            got = f"{padded[0]}×{padded[1]} after padding"
            raise ValueError(f"image: expected at most {settings['largest']} pixels, got {got}")
        return torch.from_numpy(self.graphs["vae_encoder"](pictures=pictures)["latents"])

    def _decode(self, latents: Tensor) -> Tensor:
        if self.settings["codec"] == "pixel":
            return F.pixel_shuffle(latents, self.settings["factor"])
        return torch.from_numpy(self.graphs["vae_decoder"](latents=latents)["pictures"])

    def _tiling(self, plane: tuple[int, int], tile: int, overlap: int) -> Tiling:
        settings = self.settings
        factor, patch = settings["factor"], settings["patch_size"]
        low, high = (side * patch for side in self.limits["side"])
        trained = max(low, min(settings["sample_size"], high))
        size = tile // (factor * patch) * patch if tile else trained
        if not low <= size <= high:
            span = f"{low * factor} to {high * factor}"
            raise ValueError(f"tile: expected 0 or {span} pixels, got {tile}")
        wanted = overlap // factor if tile else min(overlap // factor, size // 2)
        return plan_tiles(plane, size, wanted, patch)


def euler_sigmas(scheduler: dict[str, float], steps: int) -> np.ndarray:
    """Noise levels from 1 to 0, [steps + 1] float32: diffusers' `FlowMatchEulerDiscreteScheduler`.

    Shifted twice, as there: its ends are (SD3, arXiv 2403.03206, Eq. 23), then all in between.
    """
    count, shift = scheduler["train_steps"], scheduler["shift"]
    first, last = scheduler["sigma_max"] * count, scheduler["sigma_min"] * count
    sigmas = np.linspace(first, last, steps) / count
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return np.append(sigmas, 0).astype(np.float32)


def _finish(restored: Tensor, damaged: Tensor, strength: float, fix: str) -> np.ndarray:
    if not torch.isfinite(restored).all():
        raise ValueError("the result is not finite; export with --precision fp32")
    restored = color_fix(fix, restored, damaged)
    restored = torch.lerp(damaged, restored, strength).clamp(0, 1)
    return restored.movedim(1, -1).contiguous().numpy()
