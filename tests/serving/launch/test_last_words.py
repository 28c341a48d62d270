"""The last words of a process that failed: the error, and where it came from."""

import subprocess
import sys

import pytest

from serving.launch.last_words import MAX_CHARACTERS, exception_words, last_words

CRASH = """
import faulthandler, os, sys, threading, time
faulthandler.enable()
for _ in range(6):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("Check failed: rows < size; bad", file=sys.stderr, flush=True)
def in_the_step():
    os.abort()
in_the_step()
"""


def test_of_a_crash_the_message_and_the_thread_that_failed():
    run = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True)
    words = last_words(run.stderr.splitlines())
    assert words.startswith("Check failed: rows < size, bad | Fatal Python error: Aborted | File ")
    assert "in in_the_step" in words
    assert "threading.py" not in words


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "it wrote nothing"),
        (["", " a ", "", "b; c"], "a | b, c"),
        ([f"line {i}" for i in range(20)], " | ".join(f"line {i}" for i in range(12, 20))),
        (["x" * 5000], "x" * MAX_CHARACTERS),
    ],
)
def test_of_other_output_the_last_lines(lines, words):
    assert last_words(lines) == words


def test_of_an_exception_its_text_in_one_line_and_its_innermost_frames():
    def outer() -> None:
        {}["a\nb; c"]

    with pytest.raises(KeyError) as caught:
        outer()
    text, trace = exception_words(caught.value)
    assert text == "KeyError: 'a\\nb, c'"
    assert trace.endswith('in outer | {}["a\\nb, c"]')
