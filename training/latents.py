"""Latents computed once: pairs in safetensors shards, so that training needs no VAE.

A cache lies in a folder named after a digest of everything its contents depend on; another VAE,
data set, crop or seed makes another folder. Shards appear whole, so that a build that was
interrupted goes on where it was.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mimdit.codec import Codec, encode
from training.batches import Pair, plainly
from training.checkpoints import replace_text, sync, writing
from training.config import Settings
from training.datasets.pairs import pictures
from training.parallel import Team

# Pairs of one file; at 512×512 pixels and SD3.5's VAE 134 MB in float32.
SHARD = 256
_FORMAT = 1
# Seconds after which an unfinished file is nobody's.
_ABANDONED = 3600


@dataclass(frozen=True)
class Key:
    """What the contents of a cache depend on."""

    values: dict[str, Any]

    @property
    def digest(self) -> str:
        text = json.dumps(self.values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def key_of(codec: Codec, settings: Settings, crop: int) -> Key:
    """The key of a run's latents at one crop."""
    config = {k: v for k, v in dict(codec.config).items() if not k.startswith("_")}
    return Key(
        {
            "format": _FORMAT,
            "codec": [json.loads(json.dumps(config, default=str)), weights_digest(codec)],
            "dtype": str(codec.dtype).removeprefix("torch."),
            "data": [settings.dataset, settings.types, *data_identity(settings)],
            "mixtures": settings.mixtures,
            "seed": settings.seed,
            "crop": crop,
            "pairs": settings.latents_pairs,
        }
    )


def weights_digest(codec: Codec) -> str:
    """A digest of the names and values of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        found.update(name.encode())
        found.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()[:16]


def data_identity(settings: Settings) -> list[str]:
    """The path of the data, and a digest of its pictures' names and sizes, or of a list's text."""
    if settings.data is None:
        return ["built-in"]
    found, root = hashlib.sha256(), Path(settings.data).resolve()
    # A list of pairs, or the folder of them.
    if root.is_file():
        found.update(root.read_bytes())
    for path in pictures(root) if root.is_dir() else ():
        found.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
    return [str(root), found.hexdigest()[:16]]


class CachedLatents(Dataset[Pair]):
    """Pairs of a cache without end: `x0` and `z_lq` [c,h,w], `kinds`, `name`.

    First in the order of the source, and from then on shuffled every time round.
    """

    def __init__(self, folder: Path, pairs: int, seed: int = 0) -> None:
        self.folder, self.pairs, self.seed = folder, pairs, seed
        self._round, self._order = 0, np.arange(pairs)

    def __getitem__(self, index: int) -> Pair:
        round_, place = divmod(index, self.pairs)
        if round_ != self._round:
            rng = np.random.default_rng([self.seed, round_])
            self._round = round_
            self._order = rng.permutation(self.pairs) if round_ else np.arange(self.pairs)
        shard, row = divmod(int(self._order[place]), SHARD)
        with safe_open(_shard(self.folder, shard), "pt") as file:
            labels = json.loads(file.metadata()["labels"])[row]
            x0, z_lq = (file.get_slice(name)[row : row + 1][0] for name in ("x0", "z_lq"))
        return {"x0": x0, "z_lq": z_lq, "kinds": labels[0], "name": labels[1]}


@torch.no_grad()
def cache_latents(
    source: Dataset[Pair],
    codec: Codec,
    settings: Settings,
    crop: int,
    team: Team,
    check: Callable[[], None] = lambda: None,
) -> CachedLatents:
    """The cache of a run's first `latents_pairs` pairs at one crop, built where shards are missing.

    The processes divide the shards among them. check: called after every picture; may raise.
    """
    assert settings.latents is not None
    key = key_of(codec, settings, crop)
    folder = Path(settings.latents) / key.digest
    folder.mkdir(parents=True, exist_ok=True)
    if team.main:
        replace_text(folder / "key.json", json.dumps(key.values, indent=1))
        for left in folder.glob(".*.unfinished"):
            # Newer ones may be of another run that builds the same cache now.
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink()
    team.wait()
    count = -(-settings.latents_pairs // SHARD)
    mine = [i for i in range(count) if i % team.processes == team.rank]
    missing = [i for i in mine if not _is_whole(_shard(folder, i))]
    for i in tqdm(missing, desc=f"latents at {crop}", disable=not (missing and team.main)):
        numbers = range(i * SHARD, min((i + 1) * SHARD, settings.latents_pairs))
        rows = []
        for row in _encoded(source, numbers, codec, settings.workers, team.device):
            rows.append(row)
            check()
        tensors = {
            name: torch.stack([row[name] for row in rows]).contiguous() for name in ("x0", "z_lq")
        }
        labels = json.dumps([[row["kinds"], row["name"]] for row in rows])
        unfinished = folder / f".{i}-{secrets.token_hex(4)}.unfinished"
        with writing(unfinished, _shard(folder, i)):
            save_file(tensors, unfinished, metadata={"labels": labels})
            sync(unfinished)
            unfinished.replace(_shard(folder, i))
        sync(folder)
    team.wait()
    return CachedLatents(folder, settings.latents_pairs, settings.seed)


def _encoded(
    source: Dataset[Pair], numbers: range, codec: Codec, workers: int, device: torch.device
) -> Iterator[Pair]:
    # A list of indices is a sampler; one picture a batch, so that none depends on its neighbours.
    loader = DataLoader(source, batch_size=None, sampler=list(numbers), num_workers=workers)
    for pair in plainly(loader):
        found = {"kinds": pair["kinds"], "name": pair["name"]}
        for name, picture in (("x0", "clean"), ("z_lq", "damaged")):
            found[name] = pictures_to_latents(codec, pair[picture][None], device)[0].cpu()
        yield found


@torch.no_grad()
def pictures_to_latents(codec: Codec, pictures: Tensor, device: torch.device) -> Tensor:
    """Latents of pictures [B,3,H,W] in [0,1]."""
    return encode(codec, pictures.to(device, non_blocking=True) * 2 - 1)


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.safetensors"


def _is_whole(path: Path) -> bool:
    """Whether a shard is there and its header fits its size, which safetensors checks."""
    try:
        with safe_open(path, "pt") as file:
            return "labels" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
