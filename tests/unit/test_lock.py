"""Locks say who holds them and are free when their holder ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bakehouse import REPOSITORY, lock
from bakehouse.errors import BakehouseError

HOLD = """
import sys
from pathlib import Path
from bakehouse import lock
with lock.held(Path(sys.argv[1]), "it", wait=False, say=print):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.communicate(timeout=10)


def test_a_holder_is_written_down_and_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "slurm.lock"
    with lock.held(path, "it", wait=False, say=pytest.fail):
        assert (tmp_path / "deep" / "slurm.holder").read_text().startswith(f"process {os.getpid()} since ")
    assert not (tmp_path / "deep" / "slurm.holder").exists()


def test_a_lock_can_be_had_again(tmp_path: Path) -> None:
    for _ in range(2):
        with lock.held(tmp_path / "x.lock", "it", wait=False, say=pytest.fail):
            pass


def test_a_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"), lock.held(tmp_path / "x.lock", "it", wait=False, say=pytest.fail):
        raise RuntimeError("inside")
    with lock.held(tmp_path / "x.lock", "it", wait=False, say=pytest.fail):
        assert (tmp_path / "x.holder").is_file()


def test_locks_beside_each_other_are_apart(tmp_path: Path) -> None:
    with (
        lock.held(tmp_path / "slurm.lock", "one", wait=False, say=pytest.fail),
        lock.held(tmp_path / "slurm-gpu.lock", "two", wait=False, say=pytest.fail),
    ):
        assert {path.name for path in tmp_path.glob("*.holder")} == {"slurm.holder", "slurm-gpu.holder"}


def test_who_holds_a_lock_is_named_and_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    holder = hold_elsewhere(path)
    try:
        with (
            pytest.raises(BakehouseError, match=f"the cake is held by process {holder.pid} since") as caught,
            lock.held(path, "the cake", wait=False, say=pytest.fail),
        ):
            pytest.fail("the lock was had twice")
        assert "--no-wait" in caught.value.hint
        said: list[str] = []
        threading.Timer(0.2, holder.terminate).start()
        with lock.held(path, "the cake", wait=True, say=said.append):
            assert holder.wait(timeout=5) != 0
        assert len(said) == 1
        assert said[0].startswith(f"waiting for the cake, held by process {holder.pid} since ")
    finally:
        end(holder)


def test_a_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    holder = hold_elsewhere(path)
    holder.kill()
    end(holder)
    assert (tmp_path / "x.holder").exists(), "the killed process could not remove it"
    with lock.held(path, "it", wait=False, say=pytest.fail):
        assert (tmp_path / "x.holder").read_text().startswith(f"process {os.getpid()} ")
