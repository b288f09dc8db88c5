"""`mimdit-restore --ray`: pictures on several GPUs or hosts, through Ray Data.

Each worker holds one model. A picture of a worker that dies goes to another one; as files appear
whole or not at all and no picture depends on another, what comes out is what one process writes.
"""

import argparse
import logging
import os
import pickle
import platform
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from typing import Any

from mimdit.cli.interrupts import handling
from mimdit.cli.jobs import Job
from mimdit.cli.model import StopError
from mimdit.cli.places import is_url
from mimdit.cli.work import Outcome, Restorer
from mimdit.errors import first_line

# Ray gives the picture of a dead worker to another one, so many times in all.
_ATTEMPTS = 5
# Pictures are handed out one by one, in larger lots where there are very many.
_LOTS = 10_000


class Attempts:
    """Counts how often each picture was begun; lives outside the workers, which may die."""

    def __init__(self) -> None:
        self.count: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """How often it was begun, this time included."""
        self.count[number] += 1
        return self.count[number]


class Worker:
    """What Ray Data keeps alive in each of its processes. `attempts`: the actor that counts."""

    def __init__(self, args: argparse.Namespace, folder: str, attempts: Any) -> None:
        self.restorer = Restorer(args, {"disable": True}, silent=True)
        self.attempts = attempts
        self.missing: str | None = None
        try:
            # Relative paths mean the same here as where the command was given.
            os.chdir(folder)
        except OSError:
            if not all(is_url(p) or os.path.isabs(p) for p in (*args.input, args.output)):
                self.missing = f"{folder}: no such folder on {platform.node()}; use a shared one"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Batches of one: `number` and the pickled `job` in, `number` and pickled result out."""
        pairs = zip(batch["number"], batch["job"], strict=True)
        results = [pickle.dumps(self._restored(int(n), pickle.loads(job))) for n, job in pairs]
        return {"number": batch["number"], "result": results}

    def _restored(self, number: int, job: Job) -> Outcome | str:
        """What became of a job, or why nothing will come of any: raised, Ray would add words."""
        import ray  # pyright: ignore[reportMissingImports]

        if self.missing is not None:
            return self.missing
        begun: Any = ray.get(self.attempts.begin.remote(number))
        if begun > _ATTEMPTS:
            text = f"{job.source}: {_ATTEMPTS} workers died of it, out of memory perhaps"
            return Outcome(f"{text}; restore it without --ray to see why")
        try:
            return self.restorer(job)
        except StopError as error:
            return str(error)


def outcomes(jobs: Sequence[Job], args: argparse.Namespace) -> Iterator[tuple[Job, Outcome]]:
    """Each job once it is done, in any order.

    Raises:
        StopError: no Ray, no cluster, no worker that can load the model, or pictures that only
            this process sees.
    """
    with _cluster(args) as ray:
        workers, resources = _workers(ray, args)
        rows = [{"number": i, "job": pickle.dumps(job)} for i, job in enumerate(jobs)]
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = args.debug
        attempts = ray.remote(num_cpus=0)(Attempts).remote()
        done = ray.data.from_items(rows, override_num_blocks=min(len(rows), _LOTS)).map_batches(
            Worker,
            fn_constructor_args=(args, os.getcwd(), attempts),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(jobs))),
            **resources,
        )
        for row in done.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, str):
                raise StopError(result)
            yield jobs[int(row["number"])], result


@contextmanager
def _cluster(args: argparse.Namespace) -> Iterator[Any]:
    """Ray while it is used; all that was started for this run has ended afterwards.

    Raises StopError where it cannot be had, or fails.
    """
    with ExitStack() as stack:
        if not args.debug:
            # What Ray says of its workers goes to the output, whatever its logs are set to.
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
        stack.callback(_end)
        ray = _connect(args)
        try:
            yield ray
        except ray.exceptions.RayError as error:
            text = f"the Ray cluster failed ({first_line(error)})"
            raise StopError(f"{text}; run again with --resume to go on") from error


def _end() -> None:
    """Ends the workers and, where it was started here, the cluster."""
    if (ray := sys.modules.get("ray")) is not None:
        with _later():
            ray.shutdown()


@contextmanager
def _later() -> Iterator[None]:
    """Ctrl-C inside is raised at the end: in the middle it would leave processes of Ray behind."""
    pressed: list[int] = []
    try:
        with handling(lambda number, _: pressed.append(number), signal.SIGINT):
            yield
    finally:
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _connect(args: argparse.Namespace) -> Any:
    """Ray with `ray.data`, connected to the cluster that --ray names."""
    for place in (*args.input, args.output):
        if place.startswith("memory://"):
            raise StopError(
                f"{place}: other processes cannot see it; use a shared folder or s3:// with --ray"
            )
    if not args.debug:
        # Read when Ray is loaded: its notices, which name no picture, are not for users.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise StopError(
            f"--ray needs Ray Data ({first_line(error)}); pip install 'mimdit[ray]'"
        ) from error
    level = logging.INFO if args.debug else logging.ERROR
    # A cluster elsewhere may take long to answer, and would not be left behind.
    starts = args.ray in ("", "local")
    try:
        with _later() if starts else nullcontext():
            ray.init(args.ray or None, log_to_driver=args.debug, logging_level=level)
    # ConnectionError, RuntimeError, ValueError, and those of gRPC.
    except Exception as error:
        name = f"--ray {args.ray}".strip()
        raise StopError(f"{name}: cannot connect to the cluster ({first_line(error)})") from error
    if not args.debug:
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    return ray


def _workers(ray: Any, args: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """How many models, and what each takes: a GPU, or a share of a host's processors."""
    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(host.get("GPU", 0) for host in hosts))
    if args.device == "cuda" and not gpus:
        raise StopError("--device cuda: this cluster has no GPU; use --device auto or cpu")
    use = gpus > 0 and args.device in ("auto", "cuda")
    count = args.ray_workers or (gpus if use else len(hosts))
    if use and count > gpus:
        raise StopError(f"--ray-workers: expected at most {gpus} (the GPUs), got {count}")
    # Workers on the host that has most of them, and its processors between them.
    crowd = -(-count // len(hosts))
    if use:
        most = max(hosts, key=lambda host: host.get("GPU", 0))
        crowd = int(most.get("GPU", 1))
    processors = min(host.get("CPU", 1) for host in hosts if not use or host.get("GPU"))
    if not use and crowd > processors:
        raise StopError(
            f"--ray-workers: expected at most {int(processors) * len(hosts)} (the processors), "
            f"got {count}"
        )
    share = max(1, int(processors // crowd)) if processors >= crowd else 0
    return count, {"num_cpus": share, "num_gpus": 1 if use else 0}
