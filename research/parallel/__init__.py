"""Floor 1: the mesh, the one table from logical axes to mesh axes, and the start of many
processes.
"""
