"""A model in llama.cpp, by the calls that llama-cpp-python binds."""

import ctypes
import os
import pathlib
from collections.abc import Sequence

import llama_cpp
import numpy as np
import psutil

from research.bench.serving_models import GGUF

# Keys and values in float32, as the weights are; half of it is llama.cpp's default.
FLOAT32 = 0


@llama_cpp.llama_log_callback
def _ignore(level: int, text: bytes, data: int | None) -> None:
    """Drops what llama.cpp logs, which it does line by line of a file."""


class LlamaCpp:
    """A model with the caches of some sequences.

    Args:
      folder: has the file of the model.
      sequences: at a time.
      tokens: of each, at most.
    """

    def __init__(self, folder: pathlib.Path, sequences: int, tokens: int):
        llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = os.fsencode(folder / GGUF)
        model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * tokens
        settings.n_seq_max = sequences
        settings.n_batch = settings.n_ctx
        settings.n_threads = psutil.cpu_count(logical=False)
        settings.n_threads_batch = settings.n_threads
        settings.type_k = FLOAT32
        settings.type_v = FLOAT32
        # Sequences of different lengths share the room.
        settings.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(model, settings)
        self._batch = llama_cpp.llama_batch_init(settings.n_ctx, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def clear(self) -> None:
        """Forgets all sequences."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, False)

    def step(self, rows: Sequence[tuple[int, int, int]], last: Sequence[int] = ()) -> list[int]:
        """Reads tokens, and returns the likeliest next ones.

        Args:
          rows: sequence, position and token of each.
          last: indices of the rows after which a token is wanted; none for all.
        """
        wanted = list(last) or list(range(len(rows)))
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (sequence, position, token) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = index in wanted
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: {status}"
        found = []
        for index in wanted:
            pointer = llama_cpp.llama_get_logits_ith(self._context, index)
            logits = np.ctypeslib.as_array(pointer, (self._vocab_size,))
            found.append(int(logits.argmax()))
        return found
