"""A front whose supervisor is the parent of this process. Started as `python -m serving.front`."""

from serving.app import serve
from serving.config import Settings
from serving.orphans import die_with_parent
from serving.run_folder import RUN, RunFolder


def main() -> int:
    """Serve with the settings of the folder; the exit status."""
    die_with_parent()
    run = RunFolder.of_this_front()
    assert run is not None, f"{RUN} is not set"
    return serve(Settings.load(run.settings, {}), run)


if __name__ == "__main__":
    raise SystemExit(main())
