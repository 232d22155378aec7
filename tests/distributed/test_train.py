"""examples/train_distributed.py: killed in the middle, it goes on and ends as a run that nobody disturbed."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.processes import LINUX

pytest.importorskip("sklearn")
pytestmark = LINUX
SCRIPT = Path(__file__).parents[2] / "examples" / "train_distributed.py"
_spec = importlib.util.spec_from_file_location("train_distributed", SCRIPT)
assert _spec is not None and _spec.loader is not None
train_distributed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train_distributed)


def _process(rank: int, port: int, arguments: list[str]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    os._exit(train_distributed.main(arguments))


def start(arguments: list[str]) -> list[multiprocessing.Process]:
    """The script in two processes, as torchrun would start them, but forked: they need not import torch again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_process, args=(rank, port, arguments), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]


def losses(path: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize("parallel", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(parallel, tmp_path):
    common = ["--steps", "4", "--batch", "8", "--size", "16", "--save-every", "2", *parallel]
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    finish(start([*common, "--losses", str(whole)]))

    checkpoint = tmp_path / "checkpoint.pt"
    arguments = [*common, "--losses", str(broken), "--checkpoint", str(checkpoint)]
    processes = start([*arguments, "--steps", "1000"])
    end = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert checkpoint.exists()
    done = len(losses(broken))
    assert done < 1000
    expected = losses(whole)
    if done >= 4:  # a busy machine let it run past the end: to the same losses, at least
        assert all(losses(broken)[step] == pytest.approx(loss, rel=1e-6) for step, loss in expected.items())
        return

    finish(start(arguments))
    found = losses(broken)
    assert found.keys() == expected.keys()
    assert found[4] == pytest.approx(expected[4], rel=1e-6)
    assert expected[4] != pytest.approx(expected[1], rel=1e-3)  # it did learn


def test_torchrun_starts_it(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(SCRIPT)]
    command += ["--steps", "2", "--batch", "4", "--size", "32", "--losses", str(tmp_path / "log")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert "step 2: loss" in done.stdout and len(losses(tmp_path / "log")) == 2


def test_without_torchrun_it_says_so(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert train_distributed.main([]) == 2
    assert "torchrun" in capsys.readouterr().err
