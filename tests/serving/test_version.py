"""The build of a server: it differs as soon as anything differs that its processes run or send."""

from pathlib import Path

import pytest

from serving import version


@pytest.mark.parametrize(
    "name", ["planner/plan/plan.py", "serving/dashboard/dashboard.js", "serving/dashboard/index.html", "moejax/a.h"]
)
def test_the_build_is_another_one_when_a_file_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "__file__", str(tmp_path / "serving" / "version.py"))
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    builds = []
    for text in ("one", "two"):
        file.write_text(text)
        version.build.cache_clear()
        builds.append(version.build())
    version.build.cache_clear()
    assert builds[0] != builds[1]
