"""Timing, memory and the machine: the one place where benchmarks measure."""

import ctypes
import platform
import resource
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the host's clock sees finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one call."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def interleaved(
    variants: Mapping[str, Callable[[], Any]], device: torch.device, warmup: int, runs: int
) -> dict[str, list[float]]:
    """Seconds of each run of each variant; one of each in turn, so that drift meets all alike."""
    for _ in range(warmup):
        for run in variants.values():
            seconds(run, device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        for name, run in variants.items():
            times[name].append(seconds(run, device))
    return times


@dataclass(frozen=True)
class Replay:
    """A CUDA graph of `calls` calls; `run` keeps alive what the graph reads."""

    graph: torch.cuda.CUDAGraph
    calls: int
    run: Callable[[int], Any]


def captured(run: Callable[[int], Any], copies: int, device: torch.device) -> Replay:
    """A graph of run(0), run(1), … run(copies − 1), run(0), … of about two milliseconds.

    With copies whose sizes add up to more than the L2 cache, no call finds its inputs there; their
    results get memory of their own, too.

    Raises:
        RuntimeError: a call waits for the device, or cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Compiles, loads, and allocates the stream's workspaces: none of it can be captured.
        for i in range(3):
            run(i % copies)
        # A capture that fails leaves the allocator in disorder; this fails before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        took = min(seconds(lambda: run(0), device) for _ in range(3))
    torch.cuda.current_stream(device).wait_stream(stream)
    calls = min(100, max(copies, 5, round(2e-3 / took)))
    graph, results = torch.cuda.CUDAGraph(), deque(maxlen=copies)
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            results.append(run(i % copies))
    return Replay(graph, calls, run)


def replayed(
    replays: Mapping[str, Replay], device: torch.device, runs: int
) -> dict[str, list[float]]:
    """Seconds a call, one figure for each replay of each graph; one of each graph in turn."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    with torch.cuda.device(device):
        for _ in range(runs):
            for name, replay in replays.items():
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # The first keeps the device busy while the host enqueues the one that counts.
                replay.graph.replay()
                began.record()
                replay.graph.replay()
                ended.record()
                ended.synchronize()
                times[name].append(began.elapsed_time(ended) / 1e3 / replay.calls)
    return times


def empty_kernel(device: torch.device) -> Callable[[], None]:
    """A launch of a kernel that does nothing: what none can be faster than."""
    import triton

    from mimkernels.launch import launch

    @triton.jit
    def nothing(x):
        pass

    x = torch.empty(16, device=device)
    return lambda: launch(nothing, (1,), x)


def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def percentile(times: list[float], share: float) -> float:
    """Linear interpolation between the sorted times, share in [0,1]."""
    return torch.quantile(torch.tensor(times, dtype=torch.float64), share).item()


def peak_memory_mb(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Peak allocated and reserved memory of a call, in MB of 10⁶ bytes.

    On a CPU both are the process's resident memory, as the system keeps no other count; where that
    cannot be reset (elsewhere than on Linux), its peak since the start.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        counts = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return counts[0] / 1e6, counts[1] / 1e6
    _reset_resident_peak()
    run()
    peak = _resident_peak() / 1e6
    return peak, peak


def _reset_resident_peak() -> None:
    """Let the count start from what is resident now, after giving freed memory back."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # "5" resets the peak (proc(5), /proc/pid/clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
    # Other systems and C libraries than Linux with glibc.
    except (OSError, AttributeError, TypeError):
        return


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a large matrix product reaches here: the best of several runs."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = interleaved({"product": lambda: a @ b}, device, warmup=3, runs=10)["product"]
    return 2 * n**3 / min(times)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, that a large copy reaches here: the best of several runs."""
    size = 2**31 if device.type == "cuda" else 2**27
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source)}, device, warmup=3, runs=10)["copy"]
    return 2 * size / min(times)


def floating_point_operations(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products, convolutions and attention in a call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Not every fused attention is counted; the plain one is two matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def environment(device: torch.device) -> dict[str, Any]:
    """Where a figure was measured."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "revision": _command("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = _command(*query)
    return found


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
