from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimdit import accelerate
from mimdit.cli.studio import sentence
from mimdit.cli.work import _sentence
from mimdit.engine import plan
from mimdit.loading import assemble
from mimdit.memory import _container_room, ran_out, shrinking
from mimdit.presets import build
from mimdit.sampling import Denoiser
from tests.bench.counted import step_flops


def starved(limit: int, seen: list[tuple[int, int]]) -> Any:
    def run(tile: int, batch: int) -> str:
        seen.append((tile, batch))
        if tile * batch > limit:
            raise torch.OutOfMemoryError("tried to allocate too much\nand details")
        return "done"

    return run


def test_batches_shrink_before_tiles() -> None:
    seen: list[tuple[int, int]] = []
    released: list[int] = []
    with pytest.warns(UserWarning, match="too much; trying again with"):
        assert shrinking(starved(100, seen), 256, 3, 64, lambda: released.append(1)) == "done"
    assert seen == [(256, 3), (256, 1), (128, 1), (64, 1)]
    assert len(released) == 3
    with pytest.warns(match="too much"), pytest.raises(torch.OutOfMemoryError):
        shrinking(starved(10, []), 256, 1, 64, lambda: None)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["numpy", "cuda", "cpu", "driver", "cublas"],
)
def test_every_lack_of_memory_is_known_as_such(error: Exception) -> None:
    assert ran_out(error) and not ran_out(RuntimeError("unlucky"))
    assert _sentence("a.png", error).startswith("a.png: out of memory; use smaller tiles")
    assert sentence(None, error) == "out of memory; use a smaller picture"


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_picture_is_restored_in_smaller_tiles(
    accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = accelerate(assemble(build("debug").randomize_(0).eval(), 2), enabled=accelerated)
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))

    def restored(**options: Any) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return pipe(picture, 2, output_type="pt", generator=g, **options).images

    wanted = restored(tile=64, tile_overlap=32)
    plain = Denoiser.__call__

    def hungry(self: Denoiser, latents: Tensor, t: Tensor) -> Tensor:
        if self.tiling.size[0] > 16:
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, latents, t)

    monkeypatch.setattr(Denoiser, "__call__", hungry)
    with pytest.warns(UserWarning, match="1 tiles of 64 pixels"):
        assert torch.equal(restored(), wanted)


@pytest.mark.parametrize("dual", [(), (0,), (0, 1)], ids=str)
def test_planned_flops_are_those_that_run(dual: tuple[int, ...]) -> None:
    model = build("debug", dual_attention_layers=dual).randomize_(0).eval()
    counted = step_flops(accelerate(model), 2, 24, 16)
    made = plan(model, (2, 48, 24, 16), steps=3, device="A100")
    # The embedding of time and pooled text is left out.
    assert made.step_flops == pytest.approx(counted, rel=0.01)
    assert made.seconds == pytest.approx(3 * made.step_flops / 19.5e12)
    assert "A100" in str(made) and "TFLOP a step" in str(made)
    with pytest.raises(ValueError, match="device: expected one of"):
        plan(model, (1, 48, 8, 8), device="abacus")


def test_planned_memory_is_what_is_held() -> None:
    model = accelerate(build("debug").randomize_(0).eval())
    step_flops(model, 2, 24, 16)
    made = plan(model, (2, 48, 24, 16))
    (workspace,) = model.engine.workspaces.values()  # pyright: ignore
    assert made.buffers == workspace.buffers.bytes
    assert made.weights == sum(p.numel() * 4 for p in model.parameters())


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert _container_room(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 250\n")
    assert _container_room(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_room(tmp_path) is None
