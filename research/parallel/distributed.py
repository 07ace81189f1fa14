"""The start of many processes as one run."""

import dataclasses
import logging

import jax

from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others; on Cloud TPU, Slurm and GKE `initialize` alone is enough.

    Attributes:
      initialize: whether to start `jax.distributed`.
      coordinator: `host:port` of process 0, or None where the cluster tells.
      num_processes: how many there are, or None.
      process_id: which one this is, from 0, or None.
    """

    initialize: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        # ("host:1234", 2, 0) and (None, None, None) are complete, (None, 2, 0) is not.
        given = [self.coordinator, self.num_processes, self.process_id]
        missing = [value for value in given if value is None]
        if missing and len(missing) < len(given):
            raise UserError(
                "coordinator",
                constraint=", num_processes and process_id must be given together, or none of "
                "them.",
            )
        if self.num_processes is not None and not 0 <= self.process_id < self.num_processes:
            raise UserError(
                "process_id",
                self.process_id,
                f"must lie below num_processes = {self.num_processes}.",
            )


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes where the config asks for it; must run before any device is used.

    Raises:
      UserError: neither the config nor a cluster that JAX knows tells where the others are, or they
          do not answer.
    """
    if config.initialize:
        try:
            jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
        except (ValueError, RuntimeError) as error:
            raise UserError("distributed.initialize", True, f": {error}") from error
        if jax.process_index() > 0:  # one process tells how the run goes; all of them warn
            logging.getLogger("tessera").setLevel(logging.WARNING)
