import json
from pathlib import Path

import pytest

from bench import tiles, trace


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--model", "debug", "--device", "cpu", "--precision", "fp32", "--steps", "1"]
    sizes = ["--runs", "1", "--megapixels", "0.02", "0.05", "--out", str(out)]
    assert tiles.main([*command, *sizes]) == 0
    rows = list(map(json.loads, out.read_text().splitlines()))
    assert [row["height"] for row in rows] == [144, 224]
    for row in rows:
        assert row["parity"] and row["rel_err"] < 1e-5 and row["runs"] == 1
        each = row["seconds_per_megapixel"] * row["megapixels"]
        assert each == pytest.approx(row["picture_p50_s"])
        assert row["peak_allocated_mb"] > 0
    assert rows[0]["tiles"] < rows[1]["tiles"]
    assert "× the first" in capsys.readouterr().out


def test_a_size_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(pipe: object, side: int, *rest: object) -> dict[str, object]:
        if side > 200:
            raise RuntimeError("too large")
        times = {"picture_p50_s": 1.0, "seconds_per_megapixel": 50.0, "peak_allocated_mb": 1.0}
        return {"parity": True, "rel_err": 0.0, "tile": [128, 96], "tiles": 4} | times

    monkeypatch.setattr(tiles, "measured", measured)
    command = ["--model", "debug", "--device", "cpu", "--precision", "fp32"]
    out = tmp_path / "rows.jsonl"
    assert tiles.main([*command, "--megapixels", "0.02", "1", "--out", str(out)]) == 1
    assert len(out.read_text().splitlines()) == 2
    assert "no speed: RuntimeError: too large" in capsys.readouterr().out


def test_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--model", "debug", "--device", "cpu", "--precision", "fp32", "--sizes", "64"]
    assert trace.main([*command, "--runs", "1", "--warmup", "0", "--out", str(out)]) == 0
    whole, *kernels = map(json.loads, out.read_text().splitlines())
    assert whole["parity"] and whole["step_p50_ms"] > 0
    calls = {row["kernel"]: row["calls"] for row in kernels}
    # Of two blocks, and the second of the dual one.
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 3
    spent = sum(row["ms"] for row in kernels if row["kind"] == "products")
    assert spent == pytest.approx(whole["products_ms"])
    assert "| attention |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("_layernorm_modulate_kernel", "passes"),
        ("void at::native::vectorized_elementwise_kernel<4>", "passes"),
    ],
)
def test_kernels_by_their_names(name: str, kind: str) -> None:
    assert trace.purpose(name) == kind
