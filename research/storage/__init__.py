"""Floor 1: files and folders that are written whole or not at all, background reading and writing,
digests.
"""
