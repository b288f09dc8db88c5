"""Where a figure was measured: device, versions, clocks and temperature."""

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Where a figure was measured."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "transformers": _version("transformers"),
        "timm": _version("timm"),
        "revision": _command("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "sources": sources(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        found |= _ask(device, {"driver": "driver_version"})
        found |= {"cuda": torch.version.cuda or torch.version.hip}
        found |= {"cudnn": torch.backends.cudnn.version()}
    return found


def sources() -> str:
    """A digest of this project's code: tells versions apart where there is no git."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for package in ("mimkernels", "mimdit", "bench"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Clocks, temperature, power, and the mask of what holds clocks back; {} where nobody says."""
    known = {
        "sm_mhz": "clocks.sm",
        "memory_mhz": "clocks.mem",
        "temperature_c": "temperature.gpu",
        "power_w": "power.draw",
    }
    # Older drivers refuse a whole query for a field that they do not know.
    return _ask(device, known) | _ask(device, {"clocks_held_by": "clocks_event_reasons.active"})


def _ask(device: torch.device, fields: dict[str, str]) -> dict[str, Any]:
    """What nvidia-smi says of a device, by the names that its fields get here."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    # Its numbers are not torch's where CUDA_VISIBLE_DEVICES is set.
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    query, form = f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"
    line = _command("nvidia-smi", which, query, form)
    values = [value.strip() for value in line.split(",")] if line else []
    if len(values) != len(fields):
        return {}
    return {name: _number(value) for name, value in zip(fields, values, strict=True)}


def _number(value: str) -> float | str:
    # Driver versions have two dots, masks begin with 0x.
    try:
        return float(value)
    except ValueError:
        return value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
