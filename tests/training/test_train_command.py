"""The command: presets, files and flags; what it says where they do not fit; what it writes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mimdit.loading import load_pipeline
from training.config import ABLATIONS, PRESETS
from training.flags import parser, resolve
from training.train import main, start


def resolved(*arguments: str) -> tuple:
    return resolve(vars(parser().parse_args(list(arguments))))


def test_defaults_are_those_of_tiny() -> None:
    from training.config import Model, Settings

    assert resolved() == (Settings(), Model())
    assert resolved("--preset", "tiny") == resolved("--config", "tiny") == resolved()


def test_paper() -> None:
    settings, model = resolved("--config", "paper", "--backbone", "sd35", "--train-batch-size", "4")
    assert settings.stages == ((512, 4, 1.0),) and settings.total_batch == 128
    assert (settings.optimizer, settings.schedule, settings.learning_rate) == (
        "adam",
        "constant",
        5e-5,
    )
    assert (settings.t_mean, settings.t_std, settings.pure_noise) == (0, 1, 0)
    assert not settings.train_backbone and settings.weight_decay == 0 and settings.ema == 0.9999
    assert (model.preset, model.backbone) == ("sd35-medium", "sd35")
    assert resolved("--config", "paper", "--no-freeze-backbone")[0].train_backbone


def test_flags_override_files_and_files_presets(tmp_path: Path) -> None:
    groups = '["se", "se"]'
    text = {
        "yaml": "preset: debug\nlearning-rate: 1e-3\nmax_train_steps: 7\ngroups: [se, se]\n",
        "toml": f'preset = "debug"\nlearning-rate = 1e-3\nmax_train_steps = 7\ngroups = {groups}\n',
        "json": '{"preset": "debug", "learning-rate": 1e-3, "max_train_steps": 7, '
        f'"groups": {groups}}}',
    }
    for kind, content in text.items():
        file = tmp_path / f"run.{kind}"
        file.write_text(content)
        settings, model = resolved("--config", str(file), "--max-train-steps", "9")
        assert (settings.learning_rate, settings.steps, settings.stages) == (
            1e-3,
            9,
            ((32, 4, 1.0),),
        )
        assert model.preset == "debug" and model.options == {"groups": ["se", "se"]}
    assert resolved("--resolution", "64")[0].stages == ((64, 12, 1.0),)
    mixed = ["--stages", "128:12+256:3:0.75;256:3:0.25"]
    assert resolved(*mixed)[0].stages == (((128, 256), (12, 3), 0.75), (256, 3, 0.25))
    assert resolved(*mixed, "--train-batch-size", "2")[0].stages[0] == ((128, 256), 2, 0.75)
    assert resolved(*mixed, "--resolution", "64")[0].stages == ((64, 12, 1.0),)
    assert resolved("--train-batch-size", "5")[0].stages == ((128, 5, 0.6), (256, 5, 0.4))


def test_passes_and_the_total_batch_override_each_other(tmp_path: Path) -> None:
    """What was said last counts: a preset's total batch must not undo passes that are asked for."""
    file = tmp_path / "run.yaml"
    file.write_text("preset: paper\ngradient_accumulation_steps: 3\n")

    def passes(*flags: str) -> tuple[int, int]:
        run = resolved("--config", *flags)[0]
        return run.accumulation, run.total_batch

    assert passes("paper") == (1, 128)
    assert passes("paper", "--gradient-accumulation-steps", "4") == (4, 0)
    assert passes(str(file)) == (3, 0)
    assert passes(str(file), "--total-batch-size", "64")[1] == 64
    assert passes(str(file), "--total-batch-size", "0") == (3, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("learning_rte: 1", "got 'learning_rte'; did you mean learning_rate?"),
        ("max_train_steps: 2.5", "max_train_steps: expected int, got 2.5"),
        ("optimizer: sgd", "optimizer: expected muon, adam, adamw, adam8bit, got 'sgd'"),
        ("fsdp: 1", "fsdp: expected bool, got 1"),
        ("- 1", r"expected a table of settings in .*, got \[1\]"),
        ("a: [", "cannot be read"),
        ("preset: huge", "preset: expected one of tiny, debug"),
        ("stages: 64", "--stages: expected crop:batch:share"),
        ("stages: 64:1+128:1", "--stages: expected crop:batch:share"),
        ("stages: 64:1+128:1:1:1", "--stages: expected crop:batch:share"),
        ("stages: 64:1+0:1:1", "stages: expected crops and batches from 1, got 0:1"),
    ],
)
def test_faults_in_files(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=expected) as error:
        resolved("--config", str(file))
    assert "\n" not in str(error.value)


def test_faults_end_the_command_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", str(tmp_path / "run")]
    for arguments, code, text in (
        (["--config", "nowhere.yaml"], 2, "--config: expected a preset"),
        (["--stages", "64:1:0.5"], 2, "stages: expected shares that add up to 1, got 0.5"),
        (["--config", "paper"], 1, "--backbone: expected a folder of Stable Diffusion 3.5"),
        (["--preset", "debug", "--total-batch-size", "6"], 1, "multiple of 4"),
        (["--preset", "debug", "--resolution", "30"], 1, "multiples of 8 pixels, at most 128, for"),
        (["--preset", "debug", "--resolution", "136"], 1, "for this model, got 136"),
        (
            ["--preset", "debug", "--validation-steps", "1", "--validation-size", "10"],
            1,
            "validation_size: expected at least 11 pixels, the window of SSIM, got 10",
        ),
        (
            ["--preset", "debug", "--weighting-scheme", "sigma_squared"],
            1,
            "weighting: expected none for a model that predicts log_affine, whose loss is",
        ),
        (
            ["--preset", "debug", "--resume-from-checkpoint", "x"],
            1,
            "expected a checkpoint-N folder",
        ),
        (
            ["--preset", "debug", "--init", "m", "--experts", "2"],
            1,
            "--init: expected no --experts",
        ),
    ):
        assert main([*arguments, *out]) == code
        printed = capsys.readouterr().err.strip().splitlines()
        assert text in printed[-1] and printed[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--ema-decay 1.5", "ema: expected 0 to 1, got 1.5"),
        ("--mixtures -0.1", "mixtures: expected 0 to 1, got -0.1"),
        ("--learning-rate nan", "learning_rate: expected at least 0, got nan"),
        ("--max-grad-norm -1", "clip: expected at least 0, got -1.0"),
        ("--validation-size 0", "validation_size: expected at least 1, got 0"),
        ("--seed -1", "seed: expected at least 0, got -1"),
        (
            "--total-batch-size 8 --gradient-accumulation-steps 2",
            "--gradient-accumulation-steps: expected none beside --total-batch-size, which it "
            "follows from, got 2 and 8",
        ),
        (
            "--validation-data x",
            "--validation-data: expected --validation-steps beside it, without which it does "
            "nothing",
        ),
        (
            "--cache-pairs 5",
            "--cache-pairs: expected --cache-latents beside it, without which it does nothing",
        ),
        ("--inference-steps 0", "inference_steps: expected at least 1, got 0"),
        ("--inference-shifts 3", "inference_shifts: expected 1, 2 or 4, got 3"),
    ],
)
def test_numbers_out_of_range(
    flags: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags.split()) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_out_of_memory_says_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*values: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr("training.train.run", run)
    assert main(["--preset", "debug", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory; try a smaller --train-batch-size")
    assert printed.endswith("Tried to allocate 2 GiB.\n") and len(printed.splitlines()) == 1


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*values: object) -> None:
        raise ModuleNotFoundError("No module named 'accelerate'")

    monkeypatch.setattr("training.train.run", run)
    assert main(["--preset", "debug", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: No module named 'accelerate'; mimdit-train needs: pip install ")
    assert len(said.splitlines()) == 1


def test_what_the_model_recommends(tmp_path: Path) -> None:
    """A preset's own, that of the model it starts from, or what was asked for."""
    first = start(resolved("--preset", "debug")[1])
    assert (first.config["default_steps"], first.config["default_shifts"]) == (1, 4)
    asked = resolved("--preset", "debug", "--inference-steps", "7", "--inference-shifts", "2")[1]
    second = start(asked)
    second.save_pretrained(tmp_path)
    again = start(resolved("--init", str(tmp_path))[1])
    assert (again.config["default_steps"], again.config["default_shifts"]) == (7, 2)
    shipped = start(resolved("--init", "tiny")[1])
    assert shipped.transformer.dtype == torch.float32 and shipped.config["default_steps"] >= 1
    with pytest.raises(ValueError, match=r"--init nowhere: no such model folder; expected .*tiny"):
        start(resolved("--init", "nowhere")[1])
    changed = start(resolved("--init", str(tmp_path), "--inference-steps", "3")[1])
    assert (changed.config["default_steps"], changed.config["default_shifts"]) == (3, 2)


def test_ablations_are_presets() -> None:
    assert {f"tiny-ablation-{name}" for name in ABLATIONS} <= set(PRESETS)
    for name, options in ABLATIONS.items():
        settings, model = resolved("--preset", f"tiny-ablation-{name}")
        assert model.options == options and settings.output == f"runs/tiny-ablation-{name}"


def test_a_run_with_everything(tmp_path: Path) -> None:
    """Validation, TensorBoard, cached latents and an ablation, in two parts of one run."""
    pytest.importorskip("tensorboard")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 32), (90, 120, 60)).save(tmp_path / "pictures/one.png")
    flags = (
        f"--preset debug-ablation-sparse-sparse --output {tmp_path}/run --max-train-steps 4 "
        "--checkpointing-steps 2 --validation-steps 2 --validation-size 32 --logging-steps 1 "
        f"--validation-data {tmp_path}/pictures --inference-shifts 1 "
        f"--report-to tensorboard --cache-latents {tmp_path}/latents --cache-pairs 6 "
        "--train-batch-size 2 --lr-warmup-steps 1"
    ).split()
    assert main(flags) == 0
    assert not list((tmp_path / "run").glob(".*"))
    pipe = load_pipeline(f"{tmp_path}/run/model")
    assert pipe.transformer.config["inter"] == "sparse"
    rows = [json.loads(x) for x in (tmp_path / "run/validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    figures = rows[-1]["figures"]
    assert set(figures) >= {"blur", "noise", "haze", "rain", "low_light"}
    assert all(5 < row["psnr"] < 60 for row in figures.values())
    assert (tmp_path / "run/validation/step-4.png").is_file()
    log = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(row["routing"] and row["pictures_s"] > 0 and row["expected_end"] for row in log)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(f"{tmp_path}/run/logs")
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "validation/psnr/noise"} <= set(tags["scalars"])
    assert any(tag.startswith("routing/") for tag in tags["scalars"])
    assert tags["images"] == ["validation"]
    with pytest.raises(SystemExit):
        main(["--report-to", "nothing"])
    # A used folder is not written over.
    assert main(flags) == 1
    assert main([*flags, "--resume-from-checkpoint", "latest", "--max-train-steps", "5"]) == 0
    state = torch.load(tmp_path / "run/checkpoint-5/optimizer.bin", weights_only=True)
    assert state["param_groups"]
