"""Floor 8: one file a verb. Each has EXAMPLES, `add_arguments` and `main`, which `research.cli`
calls.
"""
