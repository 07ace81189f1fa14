"""The lines of a compile report for people."""

from collections.abc import Sequence

from research.inspection.compile_report import CompileReport
from research.inspection.report import aligned, short
from research.scaling.accidents import Finding


def compile_report_lines(report: CompileReport) -> list[str]:
    """Returns a compile report for people."""
    axes = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    return [
        f"{report.cluster.num_devices:,} devices, {report.cluster.name}: {axes or 'one device'}",
        "",
        "bytes on one device",
        *_memory_lines(report),
        "",
        *_traffic_lines(report),
        "",
        *_cost_lines(report),
        "",
        *_accident_lines(report.accidents),
    ]


def _memory_lines(report: CompileReport) -> list[str]:
    memory = report.memory
    rows = {
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "results": memory.results,
        "code": memory.code,
        "together": memory.total,
    }
    width = len(f"{memory.total:,}")
    texts = {name: f"{size:>{width},}  {short(size)}B" for name, size in rows.items()}
    if memory.limit is not None:
        texts["together"] += f" of {short(memory.limit)}B, {memory.margin:.1%} left"
    return aligned(texts)


def _traffic_lines(report: CompileReport) -> list[str]:
    if not report.traffic:
        return ["no collectives"]
    rows = [("collectives of a step", "along", "over", "times", "sent by a device", "exposed")]
    for group in report.traffic:
        at_least = "≥ " if group.is_least else ""
        rows.append(
            (
                group.kind,
                " × ".join(group.axes),
                group.network,
                f"{at_least}{group.times:,}",
                f"{at_least}{short(group.sent_bytes)}B",
                f"{group.exposed:.0%}",
            )
        )
    total = sum(group.sent_bytes for group in report.traffic)
    rows.append(("together", "", "", "", f"{short(total)}B", f"{report.exposed:.0%}"))
    return _columns(rows, left=3)


def _columns(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Returns rows of a table, its first columns aligned to the left."""
    columns = []
    for index, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        align = str.ljust if index < left else str.rjust
        columns.append([align(cell, width) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _cost_lines(report: CompileReport) -> list[str]:
    cost = report.cost
    compiling = f"{cost.compile_seconds:.1f} s, {cost.cpu_seconds:.1f} s of processors"
    return aligned(
        {
            "tracing": f"{cost.trace_seconds:.1f} s",
            "compiling": compiling,
            "memory of this process": f"{short(cost.host_bytes)}B at most",
        }
    )


def _accident_lines(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["no accidents: nothing is gathered, resharded or copied that need not be"]
    lines = [f"{len(findings)} accidents"]
    for finding in sorted(findings, key=lambda finding: -finding.bytes):
        lines += [f"  {finding.what}, {short(finding.bytes)}B", f"    {finding.where}"]
    return lines
