"""Where the time of a step goes: `python -m bench.trace`.

A step of the engine under torch's profiler: its kernels (on a CPU its operators) by what they are
for, as `bench.predict` counts them, and each kind of kernel by time. What no kernel covers of a
step's time, measured without the profiler, are gaps.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from bench import machine, measure
from bench.arguments import at_least, loading, multiples, parser
from bench.inputs import load, make_inputs, unit_of
from bench.latency import TOLERANCE
from bench.predict import predict, work_of
from bench.rows import Row, RowFile
from bench.variants import variants_of
from export.checks import relative_error
from mimdit.pipeline import MiMDiTPipeline
from mimkernels.devices import DEVICES

# By names: of kernels of cuBLAS, cuDNN and flash attention, and of torch's operators on a CPU.
_ATTENTION = re.compile(r"flash|fmha|sdpa|attention|cudnn.*mha", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|addmm|\bmm\b|bmm|conv", re.IGNORECASE)


def purpose(name: str) -> str:
    """What a kernel of this name is for: "attention", "products" or else "passes"."""
    if _ATTENTION.search(name):
        return "attention"
    return "products" if _PRODUCT.search(name) else "passes"


@torch.no_grad()
def run(pipe: MiMDiTPipeline, label: str, size: int, runs: int, warmup: int) -> list[Row]:
    """A row of the whole step, and one for each kind of kernel."""
    model = pipe.transformer
    device, given = model.device, make_inputs(pipe, size, 1)
    seen, t = given.seen.to(model.dtype), given.t
    (judge, engine), _ = variants_of(model, given.z, ["reference", "engine"])
    wanted = judge.step(seen, t, judge.encode(given.z))
    condition = engine.encode(given.z)
    with engine.sampling(t):
        relative = relative_error(engine.step(seen, t, condition), wanted)

        def step() -> Any:
            return engine.step(seen, t, condition)

        times = measure.interleaved({"step": step}, device, warmup, runs)["step"]
        spent, calls = _profiled(step, device, runs)
    whole: Row = {
        "bench": "trace",
        "model": label,
        "dtype": str(model.dtype).removeprefix("torch."),
        "height": size,
        "width": size,
        "rel_err": relative,
        "parity": relative <= TOLERANCE[model.dtype],
        "step_p50_ms": measure.percentile(times, 0.5) * 1e3,
        "launches": sum(calls.values()) / runs,
    }
    whole |= machine.environment(device) | machine.gpu_state(device)
    for kind in ("products", "attention", "passes"):
        some = [ms for name, ms in spent.items() if purpose(name) == kind]
        whole[f"{kind}_ms"] = sum(some) / runs
    whole["gaps_ms"] = whole["step_p50_ms"] - sum(spent.values()) / runs
    published = next((d for name, d in DEVICES.items() if name in whole["device"]), None)
    if published is not None:
        batch, channels, height, width = given.x.shape
        shape = (batch, channels, height, width)
        told = predict(work_of(model, shape, model.config["prompt_tokens"]), published, model.dtype)
        for kind in ("products", "attention", "passes", "gaps"):
            whole[f"predicted_{kind}_ms"] = 1e3 * getattr(told, kind)
    rows = [whole]
    for name, ms in spent.most_common():
        each = {"kernel": name, "kind": purpose(name), "calls": calls[name] / runs}
        rows.append({"bench": "trace", "height": size, **each, "ms": ms / runs})
    return rows


def _profiled(step: Any, device: torch.device, runs: int) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds and calls of each kernel (operator) in so many steps."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as record:
        for _ in range(runs):
            step()
        measure.synchronize(device)
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in record.key_averages():
        # Operators on the host have the times of their kernels once more.
        if gpu and event.device_type != DeviceType.CUDA:
            continue
        micro = event.self_device_time_total if gpu else event.self_cpu_time_total
        if micro > 0:
            spent[event.key] += micro / 1e3
            calls[event.key] += event.count
    return spent, calls


def table(rows: Sequence[Row], most: int = 25) -> str:
    """Markdown: a step by purpose, beside the prediction; then the kernels that take most."""
    whole, *kernels = rows
    lines = ["| of a step | ms | predicted |", "|---|---|---|"]
    for kind in ("products", "attention", "passes", "gaps"):
        told = whole.get(f"predicted_{kind}_ms")
        guess = "–" if told is None else f"{told:.2f}"
        lines.append(f"| {kind} | {whole[f'{kind}_ms']:.2f} | {guess} |")
    lines.append(f"| all, {whole['launches']:.0f} launches | {whole['step_p50_ms']:.2f} | |")
    lines += ["", "| kernel | for | calls | ms |", "|---|---|---|---|"]
    for row in kernels[:most]:
        lines.append(
            f"| {row['kernel'][:80]} | {row['kind']} | {row['calls']:.0f} | {row['ms']:.3f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = parser("trace", __doc__)
    p.add_argument("--sizes", type=int, nargs="+", default=[512, 1024] if gpu else [256])
    p.add_argument("--runs", type=int, default=10 if gpu else 3, help="steps in the trace")
    p.add_argument("--warmup", type=int, default=5 if gpu else 1)
    args = p.parse_args(argv)
    at_least(p, args, runs=1, warmup=0)
    with loading(p, args):
        pipe = load(args.model, args.device, args.precision)
    multiples(p, args, "sizes", unit_of(pipe))
    parity = True
    for size in args.sizes:
        file = RowFile(args.out)
        rows = run(pipe, args.model, size, args.runs, args.warmup)
        file.write(rows)
        parity &= rows[0]["parity"]
        print(f"\n{size}², rel. error {rows[0]['rel_err']:.1e}", "", table(rows), sep="\n")
    print(f"\nrows in {args.out}")
    return 0 if parity else 1


if __name__ == "__main__":
    sys.exit(main())
