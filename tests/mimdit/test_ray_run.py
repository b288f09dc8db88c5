"""A cluster of two workers, of which one is killed while it restores."""

import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimdit.cli.arguments import build_parser
from mimdit.cli.jobs import Job
from mimdit.cli.ray_run import Attempts, Worker
from mimdit.cli.restore import main
from mimdit.cli.work import Outcome

COUNT = 12


def pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (150, 160, 3), np.uint8)).save(path)
    (folder / "broken.png").write_text("text")


def files(folder: Path) -> dict[str, bytes]:
    """Files by relative path, without what a killed worker may leave hidden."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def processes(mark: str, name: bytes = b"") -> list[int]:
    """Those of the cluster that was started with this mark, with `name` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            named = name in (entry / "cmdline").read_bytes()
            if named and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def settings(folder: Path) -> dict[str, Any]:
    """Of a run in a process of its own, which its environment marks."""
    # Ray makes workers give way to everything else, which takes long on a busy machine.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    env["MARK"] = uuid.uuid4().hex
    root = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return {"cwd": folder, "env": env, "text": True, **pipes}


COMMAND = [sys.executable, "-m", "mimdit.cli.restore", "-i", "in", "--device", "cpu"]
COMMAND += ["--steps", "3", "--seed", "5"]
ON_RAY = ["-o", "many", "--ray", "local", "--ray-workers", "2"]
NEEDS = "needs Ray Data: pip install 'mimdit[ray]'"
linux = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds processes in /proc"
)


@pytest.mark.slow
@linux
def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason=NEEDS)
    pictures(tmp_path / "in")
    options = settings(tmp_path)
    mark = options["env"]["MARK"]
    assert subprocess.run([*COMMAND, "-o", "alone"], **options).returncode == 1
    found: list[int] = []
    killed = None
    with subprocess.Popen([*COMMAND, *ON_RAY], **options) as run:
        while run.poll() is None:
            found = found if len(found) == 2 else processes(mark, b"ray::MapWorker")
            done = len(list(tmp_path.glob("many/*/*.png")))
            if killed is None and len(found) == 2 and done >= 3:
                killed = found[0]
                os.kill(killed, signal.SIGKILL)
                # In the middle: more was left than the other worker had begun.
                assert done < COUNT - 2
            time.sleep(0.2)
        out, err = run.communicate()
    assert killed is not None, err
    # What Ray says of the dead worker is not for users.
    assert run.returncode == 1 and out.startswith(f"restored {COUNT} pictures into many"), err
    assert len(out.splitlines()) == 1
    assert err.splitlines()[-1].startswith("in/broken.png: not a picture"), err
    assert files(tmp_path / "many") == files(tmp_path / "alone")
    assert len(files(tmp_path / "many")) == COUNT


@pytest.mark.slow
@linux
@pytest.mark.parametrize(("moment", "times"), [("start", 1), ("work", 2)])
def test_ctrl_c_leaves_whole_pictures_and_no_process(
    tmp_path: Path, moment: str, times: int
) -> None:
    pytest.importorskip("ray.data", reason=NEEDS)
    pictures(tmp_path / "in")
    options = settings(tmp_path)
    mark = options["env"]["MARK"]

    def reached() -> bool:
        if moment == "start":
            return bool(processes(mark, b"gcs_server"))
        return len(list(tmp_path.glob("many/*/*.png"))) >= 3

    with subprocess.Popen([*COMMAND, *ON_RAY], start_new_session=True, **options) as run:
        while run.poll() is None and not reached():
            time.sleep(0.1)
        assert run.poll() is None
        for _ in range(times):
            # As a terminal does: all that it started get it.
            os.killpg(run.pid, signal.SIGINT)
            time.sleep(0.5)
        out, err = run.communicate(timeout=300)
    assert run.returncode == 130, err
    assert err.splitlines()[-1] == "mimdit-restore: stopped; run again with --resume to go on"
    assert "Traceback" not in err and len(out.splitlines()) <= 1
    deadline = time.monotonic() + 30
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left
    there = files(tmp_path / "many")
    assert len(there) < COUNT and (moment == "start") == (not there)
    assert subprocess.run([*COMMAND, "-o", "many", "--resume"], **options).returncode == 1
    whole = files(tmp_path / "many")
    assert len(whole) == COUNT and {name: whole[name] for name in there} == there
    for name in whole:
        with Image.open(tmp_path / "many" / name) as image:
            image.load()


# A cluster that lives until its input ends, and says where it is.
HEAD = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Address and mark of a cluster that runs already, as another user's does."""
    pytest.importorskip("ray.data", reason=NEEDS)
    # Newer versions ask whoever connects for it.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    options = settings(tmp_path)
    command = [sys.executable, "-c", HEAD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, **options
    ) as head:
        assert head.stdout is not None
        lines = iter(head.stdout.readline, "")
        address = next((line.split()[1] for line in lines if line.startswith("address ")), None)
        assert address is not None, head.communicate()
        yield address, options["env"]["MARK"]
        head.communicate(timeout=120)


@pytest.mark.slow
@linux
def test_ctrl_c_leaves_a_cluster_of_others_running(
    tmp_path: Path, cluster: tuple[str, str]
) -> None:
    address, mark = cluster
    pictures(tmp_path / "in")
    options = settings(tmp_path)
    command = [*COMMAND, "-o", "many", "--ray", address, "--ray-workers", "2"]
    with subprocess.Popen(command, start_new_session=True, **options) as run:
        while run.poll() is None and len(list(tmp_path.glob("many/*/*.png"))) < 3:
            time.sleep(0.1)
        assert run.poll() is None, run.communicate()
        assert len(processes(mark, b"ray::MapWorker")) == 2
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=300)
    assert run.returncode == 130, err
    assert err.splitlines()[-1] == "mimdit-restore: stopped; run again with --resume to go on"
    assert "Traceback" not in err and len(out.splitlines()) <= 1
    # Its models leave the cluster, which goes on.
    deadline = time.monotonic() + 60
    while (left := processes(mark, b"ray::MapWorker")) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left and not processes(options["env"]["MARK"])
    assert processes(mark, b"gcs_server")
    there = files(tmp_path / "many")
    assert 3 <= len(there) < COUNT
    again = subprocess.run([*command, "--resume"], **options)
    assert again.returncode == 1, again.stderr
    assert again.stdout.startswith(f"restored {COUNT - len(there)} pictures into many")
    whole = files(tmp_path / "many")
    assert len(whole) == COUNT and {name: whole[name] for name in there} == there
    assert processes(mark, b"gcs_server")


def test_without_ray_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    pictures(tmp_path)
    assert main(["-i", str(tmp_path), "-o", str(tmp_path / "out"), "--ray"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "pip install 'mimdit[ray]'" in err


def test_what_only_one_process_sees_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path)
    assert main(["-i", str(tmp_path), "-o", "memory://out", "--ray"]) == 1
    assert "other processes cannot see it" in capsys.readouterr().err


def test_workers_say_in_words_why_they_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = SimpleNamespace(get=lambda value: value)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.chdir(tmp_path)
    counter = Attempts()
    begin = SimpleNamespace(remote=lambda number: counter.begin(int(number)))
    args = build_parser().parse_args(["-i", "in", "-o", "out", "--model", "nosuch"])

    def result(worker: Worker) -> Outcome | str:
        batch = {"number": [3], "job": [pickle.dumps(Job("in/a.png", "out/a.png"))]}
        return pickle.loads(worker(batch)["result"][0])

    attempts = SimpleNamespace(begin=begin)
    elsewhere = Worker(args, str(tmp_path / "nowhere"), attempts)
    assert "use a shared one" in str(result(elsewhere)) and not counter.count
    here = Worker(args, str(tmp_path), attempts)
    for _ in range(5):
        found = result(here)
        assert isinstance(found, Outcome) and "in/a.png: no such file" in str(found.failure)
    found = result(here)
    assert isinstance(found, Outcome) and "5 workers died of it" in str(found.failure)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    counter.count.clear()
    job = pickle.dumps(Job("a.png", "out/a.png"))
    stop = pickle.loads(here({"number": [3], "job": [job]})["result"][0])
    assert isinstance(stop, str) and "cannot load the model 'nosuch'" in stop
