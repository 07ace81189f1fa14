"""Floor 3: the transformer as configuration. A family is a value of `ModelConfig`, never a branch
on its name.
"""
