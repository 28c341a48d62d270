"""Settings that a published model cannot have, refused by its config.json before it is converted."""

from pathlib import Path

from planner.errors import PlannerError
from planner.inputs.published import published_model, read_config_values, workload_of
from planner.inputs.workload import Workload
from serving.config import Settings
from serving.protocol.prepared_model import check_speculation
from serving.recovery.plan_catalog import check_arch


def check_published(settings: Settings) -> None:
    """Raise InvalidRequest for drafts, or for an architecture, that the layers of a published model do not allow.

    A model of another kind, and a configuration that cannot be read, are left to the process that prepares the model.
    """
    workload = _published_workload(Path(settings.model))
    if workload is None:
        return
    check_speculation(workload, settings.speculate)
    check_arch(workload, settings.arch)


def _published_workload(folder: Path) -> Workload | None:
    """The planner's reading of a published folder; None for any other, and where it cannot read it."""
    if not (folder / "config.json").is_file():
        return None
    try:
        values = read_config_values(folder)
        return workload_of(published_model(values), name=folder.name) if "model_type" in values else None
    except (OSError, ValueError, PlannerError):
        return None
