"""How an optimiser step's rows are divided: into calls of the attack, and into forward-backward passes.

A step's rows are the same however they are divided, and so is its gradient, the mean over its harmful rows
plus the mean over its utility rows. Utility rows fill the first micro-batches, harmful rows the last ones:
where both need fewer micro-batches than there are, no pass holds the graphs of both, and what is logged at
the end of a step has seen an attack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

STREAMS = ("harmful", "utility")


@dataclass(frozen=True)
class Division:
    """Rows over all devices; null takes what is said with each field.

    Raises: ValueError naming the field that does not divide.
    """

    harmful_per_step: int
    utility_per_step: int
    micro_batches: int = 1
    attack_batch: int | None = None
    """Harmful rows per call of the attack; null: all of the step."""
    outer_batch: int | None = None
    """Harmful rows per forward-backward pass; null: as many in each micro-batch."""
    utility_batch: int | None = None
    """Utility rows per pass; null: as many in each micro-batch."""

    def __post_init__(self) -> None:
        for name in STREAMS:
            self._check_passes(name)
        attacked, outer, count = self.attacked, self.rows("harmful"), self.harmful_per_step
        if count and (attacked % outer or count % attacked):
            raise ValueError(
                f"data.attack_batch: expected a multiple of the {outer} harmful rows of a pass that divides "
                f"harmful_per_step {count}, got {attacked}"
            )
        needed = sum(self.passes(name) for name in STREAMS)
        if 0 < needed < self.micro_batches:
            raise ValueError(
                f"data.micro_batches: expected at most {needed}, the passes that the rows are divided into, "
                f"got {self.micro_batches}; some would hold no rows"
            )

    def per_step(self, stream: str) -> int:
        """Rows of a stream in an optimiser step."""
        return self.harmful_per_step if stream == "harmful" else self.utility_per_step

    def rows(self, stream: str) -> int:
        """Rows of a stream in a micro-batch that holds any."""
        given = self.outer_batch if stream == "harmful" else self.utility_batch
        return given or self.per_step(stream) // self.micro_batches

    def passes(self, stream: str) -> int:
        """Micro-batches of a step that hold rows of a stream."""
        return self.per_step(stream) // self.rows(stream) if self.per_step(stream) else 0

    @property
    def attacked(self) -> int:
        """Harmful rows per call of the attack."""
        return self.attack_batch or self.harmful_per_step

    def weight(self, stream: str) -> float:
        """Of the mean loss of a micro-batch's rows, in a step's mean over all micro-batches."""
        passes = self.passes(stream)
        return self.micro_batches / passes if passes else 1.0

    @property
    def even(self) -> bool:
        """Whether every micro-batch holds rows of every stream that there is."""
        return all(self.weight(name) == 1.0 for name in STREAMS)

    def part(self, stream: str, place: int) -> int | None:
        """Which of a stream's parts stands in a micro-batch of the step, counted from 0."""
        passes = self.passes(stream)
        number = place if stream == "utility" else place - (self.micro_batches - passes)
        return number if 0 <= number < passes else None

    def begins_attack(self, part: int) -> bool:
        """Whether a harmful part is the first of several that are attacked together."""
        rows = self.rows("harmful")
        return self.attacked > rows and part * rows % self.attacked == 0

    def shared_by(self, devices: int) -> Division | None:
        """This, or the same rows in fewer micro-batches: the most whose rows deal out evenly."""
        for count in range(self.micro_batches, 0, -1):
            try:
                fewer = replace(self, micro_batches=count)
                fewer._check_dealt(devices)
            except ValueError:
                continue
            return fewer
        return None

    def check_devices(self, devices: int) -> None:
        """Raises: ValueError where a pass's rows cannot be dealt out evenly."""
        try:
            self._check_dealt(devices)
        except ValueError as error:
            fewer = self.shared_by(devices)
            remedy = f"; set data.micro_batches: {fewer.micro_batches}" if fewer else ""
            raise ValueError(f"{error}{remedy}") from error

    def _check_dealt(self, devices: int) -> None:
        for name in STREAMS:
            field = f"{'outer' if name == 'harmful' else 'utility'}_batch"
            if getattr(self, field) is not None and self.rows(name) % devices:
                raise ValueError(
                    f"data.{field}: expected a multiple of the {devices} devices, got {self.rows(name)}"
                )
            if self.per_step(name) and self.rows(name) % devices:
                raise ValueError(
                    f"data.{name}_per_step: expected a multiple of micro_batches x devices = "
                    f"{self.micro_batches} x {devices}, got {self.per_step(name)}"
                )

    def _check_passes(self, name: str) -> None:
        count, most = self.per_step(name), self.micro_batches
        field = "outer_batch" if name == "harmful" else "utility_batch"
        given: int | None = getattr(self, field)
        if given is None and count % most:
            raise ValueError(
                f"data.{name}_per_step: expected a multiple of micro_batches {most}, got {count}; "
                f"or set data.{field}"
            )
        if given is not None and (count % given or not count):
            raise ValueError(f"data.{field}: expected a divisor of {name}_per_step {count}, got {given}")
        if given is not None and count // given > most:
            raise ValueError(
                f"data.{field}: {count} rows by {given} are {count // given} passes, expected at most "
                f"data.micro_batches {most}; raise one of them"
            )
