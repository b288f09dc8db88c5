"""An exported folder restores pictures: its graphs and `mimdit`'s tiles, without its model.

The graphs run in ONNX Runtime, or as engines in TensorRT or TensorRT-RTX.
Torch serves as the array library: tiles, colours and noise are the pipeline's own, so equal seeds
give equal pictures. Neither diffusers nor a module of the network is imported.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from export.backends import open_graphs
from export.libraries import ExportError
from export.loop import Routing, denoiser, routing_of
from export.manifest import verify
from mimdit.inputs import Pictures, to_tensor
from mimdit.options import callback_tensors, check_generators, check_options, grid_places
from mimdit.outputs import finished
from mimdit.passes import PassCount, Progress
from mimdit.tiling import Tiling, codec_tiles, pixel_tiles, reflect_pad

Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[["ExportedPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]


class Restored(NamedTuple):
    """images: as `output_type` says; the routing taken."""

    images: Any
    routing: Routing


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
        # Named as a pipeline's, for reports of the routing.
        self.transformer = SimpleNamespace(mim=SimpleNamespace(**self.settings["mixtures"]))
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
        prompt: str | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        strength: float = 1.0,
        color_fix: str = "none",
        tile: int = 0,
        tile_overlap: int = 64,
        tile_batch: int | None = None,
        routing: str = "picture",
        experts: Mapping[str, float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: Progress | None = None,
    ) -> Restored:
        """Restore one picture or a batch of equal size; arguments as the pipeline's.

        Those that an exported folder cannot follow must be left out: captions, which need text
        encoders, and weights of experts, whose routers are inside the graphs. The result is a tuple
        with names, whatever `return_dict` says.

        Raises:
            ValueError: an argument out of range, or a result that is not finite.
        """
        settings, most = self.settings, self.limits["batch"][1]
        steps = settings["default_steps"] if num_inference_steps is None else num_inference_steps
        if num_inference_steps is None and shifts is None:
            shifts = settings["default_shifts"]
        shifts = 1 if shifts is None or output_type == "latent" else shifts
        check_options(
            steps, shifts, strength, color_fix, tile, tile_overlap, tile_batch, routing, output_type
        )
        unable = {"prompt": prompt, "negative_prompt": negative_prompt, "experts": experts or None}
        for name, value in unable.items():
            if value is not None:
                raise ValueError(f"{name}: expected none for an exported folder, got {value!r}")
        named = callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        damaged = to_tensor(image)
        pictures, _, height, width = damaged.shape
        if pictures > most:
            raise ValueError(f"image: expected 1 to {most} pictures at once, got {pictures}")
        prompts = self._prompts(guidance_scale)
        sigmas = euler_sigmas(settings["scheduler"], steps)
        places = grid_places(shifts, settings["factor"] * settings["patch_size"])
        options = (tile, tile_overlap, min(tile_batch or 1, max(1, most // pictures)))
        planned = [self._tiling((height + top, width + left), *options) for top, left in places]
        passes = [steps * len(tiling.chunks(batch)) for tiling, batch in planned]
        images, taken = torch.zeros_like(damaged), None
        with tqdm(total=0, **self._progress) as bar:
            count = PassCount(bar, progress, passes)
            for grid, (top, left) in enumerate(places):
                tiling, batch = planned[grid]
                z_lq = self._encode(reflect_pad(damaged, height + top, width + left, top, left))
                passed = count.begin(grid, passes[grid])
                tiles = (tiling, prompts, guidance_scale, batch, routing == "picture", passed)
                velocity, chosen = denoiser(self.graphs, z_lq, *tiles)
                latents = _noise(z_lq.shape, generator)
                for i, (now, then) in enumerate(pairwise(sigmas)):
                    time = torch.tensor(float(now * settings["scheduler"]["train_steps"]))
                    latents = latents + float(then - now) * velocity(latents, time)
                    if callback_on_step_end is not None:
                        given = callback_on_step_end(self, i, time, dict.fromkeys(named, latents))
                        latents = given.pop("latents", latents)
                taken = routing_of(chosen) if taken is None else taken
                if output_type == "latent":
                    return Restored(latents, taken)
                pixels = self._decode(latents) / 2 + 0.5
                images += pixels[..., top : top + height, left : left + width] / shifts
        assert taken is not None
        refusal = "the result is not finite; export with --precision fp32"
        images = finished(images, damaged, strength, color_fix, output_type, refusal)
        return Restored(images, taken)

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

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels, of whole patches."""
        settings, (low, _) = self.settings, self.limits["side"]
        patch, least = settings["factor"] * settings["patch_size"], max(settings["min_tokens"], low)
        rows, columns = (max(-(-n // patch), least) * patch for n in size)
        return rows, columns

    def _encode(self, damaged: Tensor) -> Tensor:
        """Latents of pictures padded to whole patches."""
        settings, factor = self.settings, self.settings["factor"]
        padded = self._padded((damaged.shape[-2], damaged.shape[-1]))
        pictures = reflect_pad(damaged, *padded) * 2 - 1
        if settings["codec"] == "pixel":
            return F.pixel_unshuffle(pictures, factor)
        coarse, fine = self._codec_tiles(padded[0] // factor, padded[1] // factor)

        def run(tiles: slice) -> Tensor:
            found = self.graphs["vae_encoder"](pictures=fine.cut(pictures, tiles))
            return torch.from_numpy(found["latents"])

        channels = settings["channels"]
        return coarse.blend(run, torch.empty(1).expand(len(pictures), channels, *coarse.plane), 1)

    def _decode(self, latents: Tensor) -> Tensor:
        if self.settings["codec"] == "pixel":
            return F.pixel_shuffle(latents, self.settings["factor"])
        coarse, fine = self._codec_tiles(latents.shape[-2], latents.shape[-1])

        def run(tiles: slice) -> Tensor:
            found = self.graphs["vae_decoder"](latents=coarse.cut(latents, tiles))
            return torch.from_numpy(found["pictures"])

        return fine.blend(run, torch.empty(1).expand(len(latents), 3, *fine.plane), 1)

    def _codec_tiles(self, height: int, width: int) -> tuple[Tiling, Tiling]:
        """Tiles of a plane of latents, and of the pixels that they stand for."""
        side = self.settings["codec_side"] * self.settings["patch_size"]
        return codec_tiles((height, width), side, self.settings["factor"])

    def _tiling(
        self, size: tuple[int, int], tile: int, overlap: int, batch: int
    ) -> tuple[Tiling, int]:
        """Tiles of a picture of height × width pixels, and how many a pass, at most `batch`."""
        settings = self.settings
        factor, patch = settings["factor"], settings["patch_size"]
        low, high = (side * patch for side in self.limits["side"])
        trained = max(low, min(settings["sample_size"], high))
        least = None if tile else max(low, settings["min_tokens"] * patch)
        rows, columns = (side // factor for side in self._padded(size))
        tile = tile or trained * factor
        tiling = pixel_tiles((rows, columns), tile, overlap, factor, patch, (low, high), least)
        return tiling, tiling.even(batch)


def euler_sigmas(scheduler: dict[str, float], steps: int) -> np.ndarray:
    """Noise levels from 1 to 0, [steps + 1] float32: diffusers' `FlowMatchEulerDiscreteScheduler`.

    Shifted twice, as there: its ends are (SD3, arXiv 2403.03206, Eq. 23), then all in between.
    """
    count, shift = scheduler["train_steps"], scheduler["shift"]
    first, last = scheduler["sigma_max"] * count, scheduler["sigma_min"] * count
    sigmas = np.linspace(first, last, steps) / count
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return np.append(sigmas, 0).astype(np.float32)


def _noise(shape: torch.Size, generator: Generators) -> Tensor:
    """From one generator, or one for each picture, where they live: diffusers' `randn_tensor`."""
    each = [*generator] if isinstance(generator, Sequence) else [generator]
    check_generators(len(each), shape[0])
    size = (shape[0] // len(each), *shape[1:])
    parts = [torch.randn(size, generator=g, device=g.device if g else "cpu") for g in each]
    return torch.cat(parts).cpu()
