"""Settings that a published model cannot have, refused by its config.json before it is converted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.inputs.published import DRAFTS_SERVED, draft_layers, published_model, read_config_values, workload_of
from planner.inputs.published.mistral_format import config_file
from planner.inputs.workload import Workload
from serving.config import Settings
from serving.errors import InvalidRequest
from serving.protocol.prepared_model import check_speculation
from serving.recovery.plan_catalog import check_arch


def check_published(settings: Settings) -> None:
    """Raise InvalidRequest for drafts, or for an architecture, that the layers of a published model do not allow.

    A model of another kind, and a configuration that cannot be read, are left to the process that prepares the model.
    """
    found = _published_workload(Path(settings.model))
    if found is None:
        return
    workload, config = found
    check_speculation(workload, settings.speculate)
    if settings.speculate == "mtp":
        _check_mtp(workload.name, config)
    check_arch(workload, settings.arch)


def _check_mtp(name: str, config: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a model without a layer of multi-token prediction that is served."""
    layers, kind = draft_layers(config), config.get("model_type")
    if layers != 1:
        why = f"the configuration of {name} names {layers} layers of multi-token prediction (num_nextn_predict_layers)"
    elif kind not in DRAFTS_SERVED:
        why = f"the layer of multi-token prediction of model_type {kind!r} is not served yet"
    else:
        return
    raise InvalidRequest(
        f"speculate is mtp, and {why}. Set speculate to ngram, which drafts for every model, or to off.",
        param="speculate",
    )


def _published_workload(folder: Path) -> tuple[Workload, Mapping[str, Any]] | None:
    """The planner's reading of a published folder, and its configuration; None for any other folder, and where it
    cannot read it."""
    if not config_file(folder).is_file():
        return None
    try:
        values = read_config_values(folder)
        if "model_type" not in values:
            return None
        return workload_of(published_model(values), name=folder.name), values
    except (OSError, ValueError, PlannerError):
        return None
