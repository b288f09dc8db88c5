"""Timing, memory and FLOPs: the one place where benchmarks measure."""

import contextlib
import ctypes
import gc
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Clock = Callable[[], float]
# Timed turns that are taken even where time is up.
LEAST = 3


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the host's clock sees finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(
    run: Callable[[], Any], device: torch.device, clock: Clock = time.perf_counter
) -> float:
    """Time of one call, on the wall's clock or another."""
    synchronize(device)
    began = clock()
    run()
    synchronize(device)
    return clock() - began


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    device: torch.device,
    warmup: int,
    runs: int,
    *,
    until: float = math.inf,
    after: Callable[[dict[str, list[float]]], None] = lambda _: None,
    faults: dict[str, Exception] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run of each variant; one of each in turn, so that drift meets all alike.

    until: the time (`time.perf_counter`) from which no further turn begins, but for the first
    `LEAST`. after: called with the times so far behind each turn. faults: takes the error of a
    variant that fails, which has no times then; without it the error is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-warmup, runs):
        if turn >= LEAST and time.perf_counter() >= until:
            break
        for name in list(times):
            try:
                took = seconds(variants[name], device, clock)
            except Exception as fault:
                if faults is None:
                    raise
                faults[name] = fault
                del times[name]
                continue
            if turn >= 0:
                times[name].append(took)
        if turn >= 0:
            after(times)
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


def held_memory_mb(device: torch.device) -> tuple[float, float]:
    """Allocated and reserved memory now, in MB of 10⁶ bytes, after giving back what is free.

    On a CPU both are the process's resident memory, as the system keeps no other count.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        counts = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return counts[0] / 1e6, counts[1] / 1e6
    _give_back()
    now = _resident("VmRSS") / 1e6
    return now, now


def peak_memory_mb(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Peak allocated and reserved memory of a call, counted as `held_memory_mb` does.

    On a CPU where the count cannot be reset (elsewhere than on Linux), the peak since the start.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        counts = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return counts[0] / 1e6, counts[1] / 1e6
    _give_back()
    # "5" resets the peak (proc(5), /proc/pid/clear_refs).
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    run()
    peak = _resident("VmHWM") / 1e6
    return peak, peak


def _give_back() -> None:
    """Freed memory to the system, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(count: str) -> int:
    """Bytes of this process by one of Linux's counts, elsewhere the peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{count}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matrix_peak(
    device: torch.device, dtype: torch.dtype, clock: Clock = time.perf_counter
) -> float:
    """FLOP/s that a large matrix product reaches here, by this clock: the best of several runs."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    products = {"product": lambda: a @ b}
    times = interleaved(products, device, warmup=3, runs=10, clock=clock)["product"]
    return 2 * n**3 / min(times)


def memory_bandwidth(device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Bytes/s, read and written, that a large copy reaches here, as `matrix_peak`."""
    size = 2**31 if device.type == "cuda" else 2**27
    # Zeros can be cheaper to move than data.
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = {"copy": lambda: target.copy_(source)}
    times = interleaved(copies, device, warmup=3, runs=10, clock=clock)["copy"]
    return 2 * size / min(times)


def floating_point_operations(run: Callable[[], Any], device: torch.device | None = None) -> int:
    """FLOPs of matrix products, convolutions and attention in a call; device: by default a CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from mimkernels import use_backend

    # The plain attention is two products, but holds all scores; a CPU's fused one is not counted.
    backends = [SDPBackend.MATH]
    if device is not None and device.type == "cuda":
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    # Nor are this package's kernels; their references are products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(backends), use_backend("torch"):
        run()
    return counter.get_total_flops()
