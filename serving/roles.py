"""Which ranks attend and which hold experts, when a server starts."""

from planner.cluster import Cluster
from planner.shape import shapes
from planner.throughput import assess
from planner.traffic import Traffic
from planner.workload import Workload
from serving.config import Settings
from serving.errors import InvalidRequest


def roles(settings: Settings, workload: Workload, cluster: Cluster) -> dict[int, str] | None:
    """The role of each rank, attention ranks first; None when every rank does both.

    Sides that the settings leave open get the sizes with the most predicted tokens per second, of those that keep an
    expert rank when `survive` are lost. Raises InvalidRequest for a model without experts.
    """
    if settings.arch == "collocated":
        return None
    if not workload.experts:
        raise InvalidRequest(
            f"{workload.name} has no experts that ranks of their own could hold. Leave arch out.", param="arch"
        )
    attention = settings.attention
    if attention is None and settings.experts is not None:
        attention = settings.ranks - settings.experts
    if attention is None:
        attention = _best(settings, workload, cluster)
    return {rank: "attention" if rank < attention else "expert" for rank in range(settings.ranks)}


def _best(settings: Settings, workload: Workload, cluster: Cluster) -> int:
    fitting = []
    for shape in shapes(workload, cluster, cluster.devices, arch="disaggregated", slots=settings.slots_per_rank):
        candidate = assess(workload, cluster, shape, Traffic())
        if shape.tensor == shape.dense == 1 and not candidate.reason:
            kept = shape.holders > min(settings.survive, settings.ranks - 2)
            fitting.append((kept, candidate.tokens_per_second, shape.data))
    return max(fitting)[2] if fitting else max(1, settings.ranks // 2)
