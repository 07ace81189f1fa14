"""Floor 7: benches, each a module with `add_arguments` and `main`, their peers, and counters of TPU
schedules.
"""
