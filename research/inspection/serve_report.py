"""What an engine takes of a device, and what fits: `describe --serve`."""

import dataclasses
from typing import Any

from research.core.config import plain
from research.inference.pool_sizes import EngineBytes
from research.inference.program_names import program_names
from research.inference.serve_config import ServeConfig
from research.inference.sizing import fit_tokens, gigabytes
from research.inspection.report import aligned
from research.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ServeReport:
    """An engine on a device.

    Attributes:
      serve: how it runs, with the tokens that fit.
      device: in words.
      memory: bytes of the device.
      sizes: what the engine takes of them.
      replicas: engines that the devices run.
      max_length: of the model.
      programs: that are compiled at start.
    """

    serve: ServeConfig
    device: str
    memory: int
    sizes: EngineBytes
    replicas: int
    max_length: int
    programs: list[str]

    @property
    def windowed_pages(self) -> int:
        """Pages of layers with a window, where others attend to all tokens."""
        return min(self.serve.pages_of(self.serve.tokens), self.sizes.most_windowed)

    @property
    def sequences(self) -> int:
        """Sequences of `max_length` that the cache holds."""
        return self.serve.pages_of(self.serve.tokens) // self.serve.pages_of(self.max_length)


def serve_report(
    model: ModelConfig,
    serve: ServeConfig,
    sizes: EngineBytes,
    memory: int,
    device: str,
    replicas: int,
) -> ServeReport:
    """Returns what fits.

    Args:
      model: that answers.
      serve: how the engine runs.
      sizes: what it takes of one device.
      memory: bytes of that device.
      device: in words.
      replicas: engines that the devices run.

    Raises:
      UserError: it does not fit.
    """
    tokens = fit_tokens(serve, sizes, memory - sizes.weights, model.max_length)
    serve = dataclasses.replace(serve, tokens=tokens)
    names = program_names(model, serve)
    return ServeReport(serve, device, memory, sizes, replicas, model.max_length, names)


def serve_report_lines(report: ServeReport) -> list[str]:
    """Returns the report for people."""
    sizes = report.sizes
    pages = report.serve.pages_of(report.serve.tokens)
    windowed = sizes.of_windowed(pages)
    unwindowed = sizes.of_pages(pages) - windowed
    sequences = f"{report.sequences:,} of max_length = {report.max_length:,} at a time"
    if report.sequences > report.serve.slots:
        sequences += f"; {report.serve.slots:,} slots run, the rest is for shared prompts"
    rows = {
        "device": f"{report.device}, {gigabytes(report.memory)}",
        "replicas": f"{report.replicas:,}",
        "weights": gigabytes(sizes.weights),
        "slots": f"{report.serve.slots:,}, {gigabytes(sizes.fixed)}",
        "temporaries": f"{gigabytes(sizes.temporaries)}, estimated from above",
        "pages": f"{pages:,} of {report.serve.page_size} tokens and {sizes.page:,} bytes, "
        f"{gigabytes(unwindowed)}",
        "windows": f"{report.windowed_pages:,} pages of {sizes.windowed_page:,} bytes, in layers "
        f"with a window, {gigabytes(windowed)}",
        "tokens": f"{report.serve.tokens:,}",
        "sequences": sequences,
        "programs": f"{len(report.programs)}: {'; '.join(report.programs)}",
    }
    if not sizes.windowed_page:
        del rows["windows"]
    return aligned(rows)


def serve_report_json(report: ServeReport) -> dict[str, Any]:
    """Returns the same for programs."""
    counted = {"sequences": report.sequences, "windowed_pages": report.windowed_pages}
    return {**plain(report), **counted}
