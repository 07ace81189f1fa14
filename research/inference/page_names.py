"""The digests that name the pages of prompts: of their tokens, and of all else that decides their
keys and values.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.inference.pages import chain, chain_start
from research.inference.placement import goes_by_length
from research.inference.requests import Request
from research.inference.serve_config import ServeConfig
from research.models.language_model import LanguageModelConfig


class PageNames:
    """What the digests of an engine's pages begin with.

    Args:
      config: of the model.
      serve: how the engine runs.
      params_digest: of the parameters; None gives them a name that no other engine knows.
      adapters: as of `Engine`.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        serve: ServeConfig,
        params_digest: bytes | None,
        adapters: Mapping[str, bytes],
    ):
        self._is_shared = bool(serve.prefix_cache)
        self._model = repr(config).encode()
        self._cache = serve.cache_dtype.encode()
        self._page_size = serve.page_size
        # Tiles compute as the largest one does, and without the promise any row otherwise. What
        # attention adds up at a time goes by pages.
        self._tile = f"{serve.invariant} {serve.row_tiles()[-1]} {serve.page_size}".encode()
        self._by_length = goes_by_length(config)
        self._adapters = {"": b"", **adapters}
        self.rename_params(params_digest)

    def rename_params(self, params_digest: bytes | None) -> None:
        """Begins the digests anew: pages of other parameters are other pages."""
        self._has_digest = params_digest is not None
        self._params_name = params_digest or os.urandom(16)

    def adapter_index(self, name: str) -> int:
        """Returns which adapter has a name, from 1; 0 for the empty one."""
        return list(self._adapters).index(name)

    def start(self, request: Request, limit: int) -> bytes | None:
        """Returns what the digests of a sequence's pages begin with; None where its keys are not
        those of its tokens alone, and so nobody else's.

        Args:
          request: of the sequence.
          limit: tokens that it may have.
        """
        if not self._is_shared:
            return None
        fields = {
            "model": self._model,
            "params": self._params_name,
            "cache": self._cache,
            "tile": self._tile,
            "salt": request.salt.encode("utf-8", "surrogatepass"),
            "adapter": self._adapters[request.adapter],
        }
        if self._by_length:
            fields["limit"] = str(limit).encode()
        return chain_start(fields)

    def of_prompt(self, request: Request) -> list[bytes]:
        """Returns the digests of a prompt's full pages, which mean the same in other engines.

        Raises:
          UserError: the engine's pages mean nothing to others.
        """
        if not self._has_digest:
            raise UserError(
                "params_digest", None, "is needed where pages leave an engine or come to it."
            )
        start = self.start(request, len(request.ids) + request.max_tokens)
        if start is None:
            raise UserError(
                "ids", constraint="of this model or engine have pages that no other request shares."
            )
        return chain(start, request.ids, self._page_size)


def digest_params(params: Any) -> bytes:
    """Returns a digest of parameters: of their names, types, shapes and bytes, all of which it
    reads.
    """
    digest = hashlib.sha256(b"tessera params")
    for name, leaf in named_leaves(params).items():
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{name} {array.dtype.name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
