"""From the arguments of `mimdit-export` to sizes."""

from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from export import cli
from export.engines import Target
from export.limits import Limits
from export.pictures import Picture
from export.plan import plan, targets
from mimdit.loading import assemble
from mimdit.presets import build
from tests.export.conftest import GPU_A, pipeline, with_gpu


@pytest.mark.parametrize(
    ("options", "limits", "sizes"),
    [
        (
            [],
            Limits((1, 4), (8, 24)),
            [(2, 11, 13), (1, 16, 16), (3, 17, 12), (1, 10, 15)],
        ),
        (
            ["--batch", "1"],
            Limits((1, 1), (8, 24)),
            [(1, 11, 13), (1, 16, 16), (1, 17, 12), (1, 10, 15)],
        ),
        (["--sizes", "128x128", "--batch", "1"], Limits((1, 1), (16, 16)), [(1, 16, 16)]),
        (
            ["--trt-rtx"],
            Limits((1, 4), (8, 16)),
            [(2, 11, 13), (1, 16, 16), (3, 16, 12), (1, 10, 15)],
        ),
        (
            ["--trt-rtx", "--dynamic"],
            Limits((1, 4), (8, 24)),
            [(2, 11, 13), (1, 16, 16), (3, 17, 12), (1, 10, 15)],
        ),
        (
            ["--sizes", "64x96,192x128"],
            Limits((1, 4), (8, 24)),
            [(2, 11, 13), (1, 8, 12), (1, 24, 16), (3, 17, 12), (1, 10, 15)],
        ),
    ],
    ids=str,
)
def test_plans(options: list[str], limits: Limits, sizes: list[tuple[int, ...]]) -> None:
    args = cli.build_parser().parse_args(["--out", "x", *options])
    settings = plan(pipeline(), args)
    assert settings.limits == limits
    assert list(settings.sizes) == sizes


def test_plans_of_large_grids() -> None:
    """Of a model that takes 512×512 pixels in one piece."""
    pipe = assemble(build("debug", sample_size=128, pos_embed_max_size=64))
    args = cli.build_parser().parse_args(["--out", "x"])
    settings = plan(pipe, args)
    assert settings.limits == Limits((1, 4), (8, 64))
    assert [*settings.sizes] == [(2, 11, 13), (1, 64, 64), (3, 17, 12), (1, 10, 15)]
    assert settings.picture == Picture(280, 256, 8)
    args.sizes = [(512, 512)]
    assert plan(pipe, args).picture == Picture(536, 512, 8)


def test_engines_are_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    args = cli.build_parser().parse_args(["--out", "x", "--trt-rtx"])
    for found, capability in ((None, "89"), (GPU_A | {"capability": "120"}, "120")):
        with_gpu(monkeypatch, found)
        assert targets(args) == [Target("tensorrt_rtx", (capability,))]
    args.sm = ("80", "86")
    assert targets(args) == [Target("tensorrt_rtx", ("80", "86"))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --out DIR, or --check with the folder of an earlier export"),
        (["tiny", "--no-check"], "expected --out DIR, or --check with"),
        (["--check", "x", "--precision", "fp16"], "--precision needs --out: a check is of what"),
        (["--check", "x", "--trt-rtx", "--sm", "89"], "--trt-rtx needs --out: a check is of what"),
        (["--out", "x", "--sm", "120"], "--sm needs --trt-rtx"),
        (["--out", "x", "--workspace", "2"], "--workspace needs --trt or --trt-rtx"),
        (["--out", "x", "--no-check", "--device", "cuda"], "--device needs a check, but"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_arguments_without_effect(options: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(options)
    assert error.value.code == 2
    assert f"mimdit-export: error: {message}" in capsys.readouterr().err
