"""The static shape of a step: everything that one compiled step program is specialised for."""

import dataclasses

from moejax.config.model_config import LayerKind, ModelConfig
from moejax.config.step_inputs import Bucket
from moejax.model.exchange import Exchange


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """Everything static about a step. A step program is compiled once per value of this."""

    cfg: ModelConfig
    bucket: Bucket
    ranks: int
    slots: int
    """Expert slots of each rank, per layer with experts."""
    page_size: int
    shared_memory: bool = False
    """The exchange goes through memory that the ranks share."""

    @property
    def exchange(self) -> Exchange:
        """Sizes of the largest exchange of the step."""
        if self.cfg.moe is None:
            return self._exchange(experts_per_token=1)
        return self.exchange_of("sharded" if self.cfg.shard_dense else "moe")

    def exchange_of(self, kind: LayerKind) -> Exchange:
        """Sizes of the exchanges of layers of a kind that has experts in slots."""
        return self._exchange(experts_per_token=self.cfg.experts_of(kind).experts_per_token)

    def _exchange(self, experts_per_token: int) -> Exchange:
        return Exchange(
            ranks=self.ranks,
            slots=self.slots,
            experts_per_token=experts_per_token,
            shared_memory=self.shared_memory,
        )
