"""From the arguments of `mimdit-export` to sizes."""

import pytest

pytest.importorskip("onnxruntime")

from export import cli
from export.limits import Limits
from export.pictures import Picture
from export.plan import plan
from mimdit.loading import assemble
from mimdit.presets import build
from tests.export.conftest import pipeline


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
