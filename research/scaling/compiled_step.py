"""A training step compiled for devices that need not be here, and what that took."""

import dataclasses
import re
import resource
import sys
import time
import warnings
from typing import Any

import jax

from research.core.errors import UserError
from research.scaling.cluster import Cluster
from research.training.program import Program

# `Ran out of memory in memory space hbm. Used 36.58G of 30.75G hbm.`, or `the total memory required
# for HLO temporaries (144.03G) exceeds available HBM (15.75G)`
_TOO_LARGE = re.compile(
    r"(?:Used |temporaries \()(?P<used>[\d.]+\w)(?: of |\) exceeds available HBM \()"
    r"(?P<limit>[\d.]+\w)(?P<space> vmem)?"
)
# `No such compile option: 'xla_x'`, `While setting option xla_x, 'no' is not a valid bool value.`
_NO_OPTION = re.compile(r"No such compile option: '[^']*'|While setting option .*?value")


@dataclasses.dataclass(frozen=True)
class CompileCost:
    """What compiling took on this machine.

    Attributes:
      trace_seconds: from the Python code to a program for the compiler.
      compile_seconds: of the compiler.
      cpu_seconds: of the compiler, all threads together; it depends less on what else runs.
      host_bytes: the most memory that this process has had.
    """

    trace_seconds: float
    compile_seconds: float
    cpu_seconds: float
    host_bytes: int


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a compiled program on one device.

    Attributes:
      arguments: the state, frozen parameters and a batch; the new state takes the same bytes.
      temporaries: what the program reserves beside them.
      results: what it returns that takes the place of no argument.
      code: the program itself.
      limit: of the device; None where it has no memory of its own.
    """

    arguments: int
    temporaries: int
    results: int
    code: int
    limit: int | None

    @property
    def total(self) -> int:
        """All of them."""
        return self.arguments + self.temporaries + self.results + self.code

    @property
    def margin(self) -> float | None:
        """The share of the limit that is left."""
        return None if self.limit is None else 1 - self.total / self.limit


def compile_step(program: Program, cluster: Cluster) -> tuple[Any, CompileCost]:
    """Returns the compiled training step of a program, and what it took.

    Args:
      program: on a mesh of `topology.cluster_devices(cluster)`.
      cluster: for messages.

    Raises:
      UserError: the compiler says that the step does not fit the memory of a device.
    """
    start = time.perf_counter()
    lowered = program.lower_train_step()
    traced = time.perf_counter()
    cpu_start = time.process_time()
    with warnings.catch_warnings():
        # These programs are cached like all others, but JAX cannot load them without the chip.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        try:
            compiled = lowered.compile(program.compiler_options)
        except jax.errors.JaxRuntimeError as error:
            raise _mistake(error, cluster) or error from error

    end = time.perf_counter()
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    cpu_seconds = time.process_time() - cpu_start
    return compiled, CompileCost(traced - start, end - traced, cpu_seconds, peak)


def _mistake(error: Exception, cluster: Cluster) -> UserError | None:
    """Returns what a user can mend of what the compiler raised, if it is that."""
    found = _TOO_LARGE.search(str(error))
    if found is not None:
        if found["space"]:
            # More devices do not help: it is the compiler's choice of tiles for these shapes.
            fault = f"the compiler needs {found['used']} of {found['limit']} of vector memory"
            advice = "Use other sizes of mesh axes, or another generation"
            return UserError("mesh", constraint=f": {fault}. {advice}.")
        needed = f"a device needs {found['used']} of its {found['limit']}"
        return UserError("devices", cluster.name, f"is too small: {needed}.")
    found = _NO_OPTION.search(str(error))
    if found is not None:
        return UserError("mesh.compiler_options", constraint=f": {found[0]}.")
    return None


def device_memory(compiled: Any, limit: int | None) -> DeviceMemory:
    """Returns the bytes that a compiled program takes on one device of `limit` bytes."""
    found = compiled.memory_analysis()
    return DeviceMemory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        results=found.output_size_in_bytes - found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        limit=limit,
    )
