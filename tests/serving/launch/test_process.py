"""Processes of one machine: a child never outlives its parent, and shared memory never outlives its users."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.launch.process import shared_file
from tests.support.processes import has_ended
from tests.support.waiting import until

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
CHILD = """
import time
from serving.launch.process import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.anyio
async def test_the_kernel_ends_a_child_with_its_parent() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not has_ended(child)
    parent.kill()
    parent.communicate()
    await until(lambda: has_ended(child))


def test_a_shared_file_is_one_memory_for_all_who_open_it_and_then_has_no_name() -> None:
    with shared_file() as path:
        Path(path).write_bytes(b"from one")
        with Path(path).open("r+b") as other:
            assert other.read() == b"from one"
            other.seek(0)
            other.write(b"back")
        assert Path(path).read_bytes() == b"back one"
    assert not os.path.exists(path)
