"""Pictures by number: any division of the work and any place to go on gives the same ones."""

import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from mimdit.codec import encode
from mimdit.presets import pixel_codec
from tests.mimdit.sd35_folder import vae
from training import latents
from training.batches import DrawnPairs, Epochs, batches, draw_noise, draw_place, pairs
from training.config import Settings
from training.latents import cache_latents, key_of
from training.parallel import Team
from training.schedule import Schedule, stage_of

RUN = Settings(steps=7, stages=((16, 4, 0.5), (32, 2, 0.5)), workers=0)


def test_schedule_counts_every_picture_once() -> None:
    for processes, settings in ((1, RUN), (2, RUN), (2, replace(RUN, accumulation=3))):
        schedule = Schedule(settings, processes)
        numbers = [
            n
            for step in range(7)
            for i in range(schedule.at(step).passes)
            for rank in range(processes)
            for n in schedule.pictures(step, i, rank)
        ]
        assert sorted(numbers) == list(range(len(numbers)))
        crops = [schedule.at(step).crop for step in range(7)]
        assert crops == [stage_of(step, settings)[0] for step in range(7)] == [16] * 4 + [32] * 3
        assert schedule.pixels(3, 7) == sum(
            schedule.at(s).crop ** 2 * schedule.at(s).batch * schedule.at(s).passes * processes
            for s in range(3, 7)
        )
    held = replace(RUN, total_batch=8)
    for processes in (1, 2):
        assert Schedule(held, processes).at(6).first == Schedule(held, 1).at(6).first == 48


MIXED = replace(RUN, steps=11, stages=((16, 4, 0.25), ((16, 32, 16), (4, 2, 1), 0.75)))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("settings", [MIXED, replace(MIXED, accumulation=3)])
def test_crops_of_a_stage_take_turns(settings: Settings, processes: int) -> None:
    schedule = Schedule(settings, processes)
    # Steps 0 to 2 are the first stage; then 16:4, 32:2 and 16:1 in turn, and two left over.
    sizes = [(16, 4)] * 3 + [(16, 4), (32, 2), (16, 1)] * 2 + [(16, 4), (32, 2)]
    steps = [schedule.at(step) for step in range(11)]
    assert [(step.crop, step.batch) for step in steps] == sizes
    assert [stage_of(step, settings) for step in range(11)] == sizes
    taken = [
        n
        for step in range(11)
        for i in range(schedule.at(step).passes)
        for rank in range(processes)
        for n in schedule.pictures(step, i, rank)
    ]
    assert taken == list(range(len(taken)))
    assert [schedule.end_of_stage(step) for step in (0, 2, 3, 10)] == [3, 3, 11, 11]
    of_step = [s.crop**2 * s.batch * s.passes * processes for s in steps]
    for begun, end in ((0, 11), (2, 5), (4, 10), (7, 7), (3, 11)):
        assert schedule.pixels(begun, end) == sum(of_step[begun:end])


def test_a_total_batch_fits_every_crop_of_a_turn() -> None:
    held = replace(RUN, stages=(((16, 32), (4, 2), 1.0),), total_batch=8)
    assert [(s.passes, s.first) for s in map(Schedule(held, 2).at, range(3))] == [
        (1, 0),
        (2, 8),
        (1, 16),
    ]
    with pytest.raises(ValueError, match=r"multiple of 6 \(2 processes × 3 pictures\), got 8"):
        Schedule(replace(held, stages=(((16, 32), (4, 3), 1.0),)), 2)


def test_each_crop_of_a_turn_has_batches_of_its_own_from_any_step() -> None:
    schedule = Schedule(MIXED, 1)
    for begun in (3, 5, 7):
        streams = {
            crop: batches(pairs(MIXED, crop), schedule, step, 0, 0)
            for crop in (16, 32)
            for step in [min(s for s in range(begun, 11) if schedule.at(s).crop == crop)]
        }
        for step in range(begun, 11):
            now = schedule.at(step)
            batch = next(streams[now.crop])
            assert batch["numbers"] == schedule.pictures(step, 0, 0)
            assert batch["clean"].shape == (now.batch, 3, now.crop, now.crop)
        assert not [left for stream in streams.values() for left in stream]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_for_two_processes_from_any_step(workers: int) -> None:
    source = pairs(RUN, 16)
    one, two = Schedule(RUN, 1), Schedule(replace(RUN, stages=((16, 2, 0.5), (32, 1, 0.5))), 2)
    whole = list(batches(source, one, 0, 0, workers))
    halves = [list(batches(source, two, 2, rank, workers)) for rank in (0, 1)]
    assert len(whole) == 4 and [len(half) for half in halves] == [2, 2]
    for batch, *parts in zip(whole[2:], *halves, strict=True):
        for name in ("clean", "damaged"):
            assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
        assert batch["kinds"] == [kind for part in parts for kind in part["kinds"]]


def test_noise_belongs_to_the_picture_and_the_place_to_the_step() -> None:
    t, noise = draw_noise([5, 6, 9], (3, 4, 4), RUN)
    again = draw_noise([6], (3, 4, 4), RUN)
    assert torch.equal(again[0], t[1:2]) and torch.equal(again[1], noise[1:2])
    assert not torch.equal(noise[0], noise[1])
    other = draw_noise([6], (3, 4, 4), replace(RUN, seed=1))[1]
    assert not torch.equal(other, noise[1:2])
    places = {draw_place(step, (4, 2), 16, RUN) for step in range(200)}
    assert {top for top, _ in places} == set(range(13))
    assert {left for _, left in places} == set(range(15))


class Letters(Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> str:
        return "abcde"[index]


class Crops(Letters):
    def pair(self, index: int, draw: int) -> str:
        return f"{self[index]}{draw}"


def test_epochs_shuffle_anew_and_draw_anew() -> None:
    endless = Epochs(Letters(), seed=1)
    epochs = ["".join(endless[n] for n in range(5 * e, 5 * e + 5)) for e in range(6)]
    assert {"".join(sorted(epoch)) for epoch in epochs} == {"abcde"} and len(set(epochs)) > 1
    # In any order, and not only forwards.
    assert [Epochs(Letters(), seed=1)[n] for n in (29, 3, 11)] == [
        epochs[5][4],
        epochs[0][3],
        epochs[2][1],
    ]
    assert Epochs(Crops(), seed=1)[7] == f"{epochs[1][2]}7"


def test_named_data_sets(tmp_path: Path) -> None:
    for part in ("input", "target"):
        (tmp_path / part).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{i}.png")
    run = replace(RUN, data=str(tmp_path), dataset="folder")
    first = next(batches(pairs(run, 16), Schedule(run), 0, 0, 0))
    assert first["clean"].shape == (4, 3, 16, 16)
    # Input and target are equal files here, so aligned crops are, too.
    assert torch.equal(first["clean"], first["damaged"])
    with pytest.raises(
        ValueError, match="--data: expected the folder of data set folder, got none"
    ):
        pairs(replace(run, data=None), 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(workers: int, tmp_path: Path) -> None:
    """In one sentence, also where a worker found it; the workers end, though the error is kept."""
    for part in ("input", "target"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (40, 48)).save(tmp_path / part / "0.png")
    broken = tmp_path / "input/0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    run = replace(RUN, data=str(tmp_path), dataset="folder")
    with pytest.raises(ValueError, match="^" + re.escape(str(broken))) as error:
        next(batches(pairs(run, 16), Schedule(run), 0, 0, workers))
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_types_need_a_data_set() -> None:
    with pytest.raises(ValueError, match=r"--types: expected --dataset beside it .*for 05Noise"):
        pairs(replace(RUN, types=("05Noise",)), 16)


def test_latents_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD", 3)
    run = replace(RUN, latents=str(tmp_path), latents_pairs=7)
    codec, source, team = pixel_codec(), DrawnPairs(16), Team()
    calls: list[int] = []
    own = latents.pictures_to_latents
    monkeypatch.setattr(latents, "pictures_to_latents", lambda *a: calls.append(1) or own(*a))

    def stop() -> None:
        if len(calls) > 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        cache_latents(source, codec, run, 16, team, stop)
    folder = tmp_path / key_of(codec, run, 16).digest
    assert [p.name for p in sorted(folder.glob("shard*"))] == ["shard-00000.safetensors"]
    calls.clear()
    cached = cache_latents(source, codec, run, 16, team)
    assert len(calls) == 8
    for n in range(7):
        pair = source[n]
        assert torch.equal(cached[n]["x0"], encode(codec, pair["clean"][None] * 2 - 1)[0])
        assert torch.equal(cached[n]["z_lq"], encode(codec, pair["damaged"][None] * 2 - 1)[0])
        assert cached[n]["kinds"] == pair["kinds"]
    again = [cached[n]["name"] for n in range(7, 14)]
    assert sorted(again) == sorted(cached[n]["name"] for n in range(7))
    # A shard cut short is made again.
    broken = folder / "shard-00001.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    calls.clear()
    cache_latents(source, codec, run, 16, team)
    assert len(calls) == 6
    assert json.loads((folder / "key.json").read_text())["crop"] == 16


def test_other_contents_have_other_keys(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    run = replace(RUN, data=str(tmp_path), latents=str(tmp_path))
    codec = vae()
    keys = [key_of(codec, run, 16), key_of(codec, run, 32), key_of(pixel_codec(), run, 16)]
    keys += [key_of(codec, replace(run, seed=1), 16), key_of(codec, replace(run, data=None), 16)]
    with torch.no_grad():
        next(codec.parameters()).add_(1)
    keys.append(key_of(codec, run, 16))
    (tmp_path / "a.png").write_bytes(b"12")
    keys.append(key_of(codec, run, 16))
    for line in ("a", "b"):
        (tmp_path / "list.txt").write_text(line)
        keys.append(key_of(codec, replace(run, data=str(tmp_path / "list.txt")), 16))
    assert len({key.digest for key in keys}) == len(keys)
