"""Floor 2: the operations that decide the speed of a language model, one folder each.

A folder's API (`__init__.py`) documents the operation and picks the implementation: `reference.py`
is the plain mathematics and supports every call; `cpu.py`, `tpu.py` and `gpu.py` are fast and take
what their docstrings say.
"""
