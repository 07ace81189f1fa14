"""Floor 2: the operations that decide the speed of a language model, one folder each.

A folder's face (`__init__.py`) documents the operation and picks the body: `reference.py` is the
plain mathematics and takes everything; `cpu.py`, `tpu.py` and `gpu.py` are fast and take what their
face says.
"""
