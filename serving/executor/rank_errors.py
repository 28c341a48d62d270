"""Why a rank did not do what it was asked to: it is lost, it failed, or its values are not finite."""


class RankLost(Exception):
    """A rank will not answer: it died, or was declared dead."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(f"rank {rank} is lost: {cause}")
        self.rank = rank


class CommandFailed(Exception):
    """A rank is alive and could not carry out a command."""

    def __init__(
        self, rank: int, what: str, error: str, non_finite_rows: tuple[int, ...] = (), *, exchange: bool = False
    ) -> None:
        super().__init__(f"rank {rank} could not {what}: {error}")
        self.rank = rank
        self.error = error
        self.non_finite_rows = non_finite_rows
        """Rows of a step whose values are not finite."""
        self.exchange = exchange
        """Whether the exchange of a step with other ranks failed, and not the rank itself."""


class NonFiniteStep(Exception):
    """A step had values that are not finite, in `rows` by rank. All ranks have ended it, and it must not be applied."""

    def __init__(self, rows: dict[int, tuple[int, ...]]) -> None:
        super().__init__(f"values that are not finite on ranks {sorted(rows)}")
        self.rows = rows
