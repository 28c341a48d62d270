"""The code that processes run: whose it is, how it is started, and that a program which is none is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.errors import InvalidRequest
from serving.launch.code import Code, check_owned, read_code
from serving.version import build
from tests.support.checkouts import copy_checkout
from tests.support.processes import ROOT

pytestmark = pytest.mark.anyio


def printed(code: Code, folder: Path) -> str:
    """The folder that a program of this code imports the server from, started in `folder`."""
    program = code.command("serving.launch.code")
    environment = code.environment({**os.environ, "PYTHONPATH": str(ROOT)})
    ran = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return ran.stdout


def test_the_code_of_this_process_changes_nothing_in_the_environment() -> None:
    own = Code.own()
    assert own.build == build()
    assert own.environment({"A": "1"}) == {"A": "1"}
    assert Code.from_json(own.to_json()) == own


async def test_a_copy_is_imported_from_its_folder_whatever_the_working_directory_has(tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path / "copy")
    code = await read_code(sys.executable, str(copy))
    assert code.root == str(copy)
    assert code.build != build()
    assert f'"{copy}"' in printed(code, ROOT)


@pytest.mark.parametrize(
    ("python", "path", "text"),
    [
        ("/no/such/python", "", "cannot be started"),
        (sys.executable, "{empty}", "imports moejax from|cannot be started"),
        ("/bin/true", "", "is no moejax"),
        ("/bin/false", "", "cannot be started"),
    ],
)
async def test_what_is_no_code_of_moejax_is_refused(python: str, path: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=text):
        await read_code(python, path.format(empty=tmp_path))


def test_code_that_others_can_change_is_refused(tmp_path: Path) -> None:
    check_owned(str(tmp_path), param="path")
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving").chmod(0o775)
    with pytest.raises(InvalidRequest, match=r"mode 775.*go-w"):
        check_owned(str(tmp_path), str(tmp_path / "serving"), param="path")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        check_owned(str(tmp_path / "missing"), param="python")
