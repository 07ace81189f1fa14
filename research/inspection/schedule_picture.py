"""A pipeline's schedule as text: who does what when, and how long devices wait."""

from research.parallel.pipeline_schedule import PipelineSchedule, schedule_lines
from research.parallel.pipeline_slots import make_tables

# Columns of a picture; what is wider is cut.
MOST_COLUMNS = 100


def schedule_picture(schedule: PipelineSchedule) -> list[str]:
    """Returns the table of a schedule, and what it costs.

    How long devices wait is worked out for stages whose forward pass, gradient of the input and
    gradient of the parameters take equally long; a backward pass begins with a forward pass.
    """
    lines = []
    for line in schedule_lines(schedule):
        if len(line) > MOST_COLUMNS:
            line = line[: MOST_COLUMNS - 1] + "…"
        lines.append(line)

    # Three products of the same size, and the first of them again in each part of a backward pass.
    half = 1.5
    if schedule.name == "zero_bubble":
        half = 2.0
    share = schedule.bubble(1.0, half, half)
    slots = make_tables(schedule).input_slots
    name = schedule.name
    if schedule.chunks > 1:
        name += f" of {schedule.chunks} chunks"
    title = (
        f"pipeline: {name}, {schedule.microbatches} microbatches; devices wait {share:.1%} of the "
        f"time, and keep up to {slots} inputs"
    )
    return [title, *lines]
