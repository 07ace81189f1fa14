"""The engine: requests in, answers out, over one or several replicas of a model."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from research.core.errors import UserError
from research.core.interrupts import delayed_signals
from research.core.trees import named_leaves
from research.data.tokenizers import Tokenizer
from research.inference.answers import Answer
from research.inference.compilations import serving
from research.inference.layouts import Layouts, formatted, step_layouts
from research.inference.page_transfer import ExportedPages, PageTransfer
from research.inference.pooling import WholeTexts
from research.inference.replica import Replica
from research.inference.requests import Request
from research.inference.serve_config import ServeConfig
from research.inference.sizing import sized
from research.inference.text_reader import TextReader, refuse_capacity
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig
from research.parallel.mesh_axes import DATA_AXIS

logger = logging.getLogger("tessera")


class Engine(WholeTexts):
    """Answers requests. An answer is a function of its request alone: not of the others, of caches,
    of how its prompt is cut, or of the replica that takes it.

    Args:
      config: of the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      serve: how it runs.
      mesh: that the parameters are sharded over; None is one device. Along `data` there is a
        replica for each index.
      draft: config and parameters of a smaller model that guesses, or None.
      params_digest: of the parameters, from `digest_params` or a checkpoint's own: engines with the
        same one may have each other's pages. None where pages stay here.
      adapters: digest of each adapter that the model has, by the name that requests give it. The
        rows of a request that names the first one have 1 in the model's input `adapters`, and so
        on; rows of others have 0.

    Attributes:
      serve: how it runs, with the tokens of its cache where they followed from the memory.
      replicas: what takes the steps; none for an encoder, which reads whole texts alone.

    Raises:
      UserError: a model whose answers depend on each other, parameters on another device than the
        mesh, or memory too small.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        serve: ServeConfig,
        mesh: Mesh | None = None,
        draft: tuple[ModelConfig, Any] | None = None,
        params_digest: bytes | None = None,
        adapters: Mapping[str, bytes] | None = None,
    ):
        refuse_capacity(config)
        self._config = config
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._num_ids = min(tokenizer.vocab_size, config.vocab_size)
        self._num_ends = len(tokenizer.end_ids)
        self._meshes = [None] if mesh is None else replica_meshes(mesh)
        # Of a single replica its own: what lies otherwise is not held twice.
        self._params = params
        self._adapters = adapters or {}
        self.replicas: list[Replica] = []
        self._placed: list[Any] = []
        self._layouts: Layouts = {}
        self._replica_of: dict[Answer, Replica] = {}
        self.serve = serve.of_structure(config.structure)
        if config.structure == "encoder":
            return

        self._hold(params, self._parts(params))
        shape = (self._num_ids, self._meshes[0], draft)
        given = self.serve
        # What the user got wrong is said before anything is compiled.
        self.serve = sized(config, self._placed[0], given, *shape)
        self._layouts = step_layouts(config, self._placed[0], self._meshes[0], self.serve)
        if self._layouts:
            self._hold(params, [formatted(part, self._layouts) for part in self._placed])
            self.serve = sized(config, self._placed[0], given, *shape)
        for part, own in zip(self._placed, self._meshes, strict=True):
            replica = Replica(
                config, part, tokenizer, self.serve, own, draft, params_digest, self._adapters
            )
            self.replicas.append(replica)

    @functools.cached_property
    def _reader(self) -> TextReader:
        return TextReader(self._config, self._params, self._tokenizer, self._mesh)

    def submit(self, request: Request) -> Answer:
        """Queues a request. One without a seed is given one, which the answer says.

        Raises:
          UserError: it does not fit the model or the engine.
        """
        self._check(request)
        answer = Answer(request)
        replica = min(self.replicas, key=lambda each: each.members.load)
        with delayed_signals():
            replica.submit(answer)
            self._replica_of[answer] = replica
        return answer

    def _check(self, request: Request) -> None:
        if not self.replicas:
            raise UserError("model.structure", "encoder", "makes no text: it has no decoder.")
        request.check(self._config, self._num_ids, self.serve)
        self._check_adapter(request.adapter)
        if request.beams is None:
            return
        # Of each hypothesis as many continuations as there are beams, beside those that end it.
        beams = request.beams.num_beams
        top = self.serve.top_logprobs
        if min(beams * (1 + self._num_ends), self._config.vocab_size) > top:
            raise UserError(
                "num_beams",
                beams,
                f"must be at most {top // (1 + self._num_ends)}, for the engine's top_logprobs = "
                f"{top}.",
            )

    def _check_adapter(self, name: str) -> None:
        if not name:
            return
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise UserError("adapter", name, f"is not one of the engine's: {known}.")
        structure = self._config.structure
        if structure != "decoder":
            raise UserError("adapter", name, f"is for decoders, not for a model of {structure!r}.")

    def abort(self, answer: Answer) -> None:
        """Ends a request, in whatever state it is: its pages are free for the next step."""
        replica = self._replica_of.get(answer)
        if replica is not None:
            with delayed_signals():
                replica.abort(answer, "aborted")

    def run_step(self) -> bool:
        """Starts a step of each replica and reads the one before; returns whether there is more to
        do.
        """
        with serving():
            under_way = [replica.run_step() for replica in self.replicas]
        for replica in self.replicas:
            for answer in replica.members.take_ended():
                self._replica_of.pop(answer, None)
        return any(under_way)

    def submit_all(self, requests: Sequence[Request]) -> list[Answer]:
        """Queues requests.

        Raises:
          UserError: as of `submit`; then none is queued.
        """
        for request in requests:
            self._check(request)
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(self.submit(request))
        except BaseException:
            for answer in answers:
                self.abort(answer)
            raise
        return answers

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers requests, and returns the answers in their order."""
        answers = self.submit_all(requests)
        try:
            for answer in answers:
                # Those before it have ended, so that each is asked about once.
                while not answer.finished:
                    self.run_step()
        except BaseException:
            for answer in answers:
                self.abort(answer)
            raise
        return answers

    def stream(self, request: Request) -> Iterator[Answer]:
        """Answers a request, and yields the answer after each step, and once when it has ended.

        Raises:
          UserError: it does not fit the model or the engine.
        """
        self._check(request)
        return self._steps_of(request)

    def _steps_of(self, request: Request) -> Iterator[Answer]:
        # What nobody begins to read is not begun either.
        answer = self.submit(request)
        try:
            while not answer.finished:
                self.run_step()
                # Steps of others end it too.
                if not answer.finished:
                    yield answer
            yield answer
        finally:
            if not answer.finished:
                self.abort(answer)

    def export_pages(self, request: Request) -> ExportedPages:
        """Returns the full pages of a prompt that are here, for an engine with the same model on
        the same kind of device; its mesh may be another.

        Args:
          request: answered or under way; those that may have its pages begin with its tokens and
            have its salt and, where RoPE goes by length, its number of tokens.

        Raises:
          UserError: no page of it is here, none is shared, or the engine has no `params_digest` or
            is made without `transfers`.
        """
        with serving():
            transfers = self._transfers(request)
            counts = [transfer.count(request) for transfer in transfers]
            return transfers[counts.index(max(counts))].export_pages(request)

    def import_pages(self, request: Request, pages: ExportedPages) -> None:
        """Takes pages of a prompt from another engine: requests that begin as this one read only
        the rest, as if the pages had been written here.

        Args:
          request: whose prompt they are of.
          pages: from `export_pages`.

        Raises:
          UserError: they are damaged, of other tokens, parameters or page types, or above what is
            free; none is shared, or the engine has no `params_digest` or is made without
            `transfers`.
        """
        with serving(), delayed_signals():
            for transfer in self._transfers(request):
                transfer.import_pages(request, pages)

    def _transfers(self, request: Request) -> list[PageTransfer]:
        """Returns what moves pages of a prompt, of each replica."""
        self._check(request)
        found = [replica.transfer for replica in self.replicas if replica.transfer is not None]
        if not found:
            raise UserError(
                "transfers",
                False,
                "moves no pages: an engine that does is made with transfers = True, and compiles "
                "the programs at start.",
            )
        return found

    def update_params(self, params: Any, params_digest: bytes | None = None) -> None:
        """Goes on with other parameters of the same shapes, in running answers too, whose tokens so
        far are read again.

        Args:
          params: the new ones.
          params_digest: of them, as of the engine.

        Raises:
          UserError: parameters of other names, shapes or types.
        """
        given = _shapes(params)
        expected = _shapes(self._params)
        if given != expected:
            names = {name for name, _ in set(given.items()) ^ set(expected.items())}
            name = min(names)
            was = expected.get(name, "missing")
            raise UserError(
                "params", constraint=f": {name} is {given.get(name, 'missing')} and was {was}."
            )
        # Of the same names, in the same order, but maybe in a `FrozenDict`
        params = jax.tree.unflatten(jax.tree.structure(self._params), jax.tree.leaves(params))
        # Placed as those that they replace: others would be other programs.
        placed = []
        for old in self._placed:
            part = jax.tree.map(_as_placed, params, old)
            placed.append(formatted(part, self._layouts))
        with delayed_signals():
            for replica, part in zip(self.replicas, placed, strict=True):
                replica.update_params(part, params_digest)
            self._hold(params, placed)
            self.__dict__.pop("_reader", None)

    def _hold(self, params: Any, placed: list[Any]) -> None:
        self._placed = placed
        self._params = placed[0] if len(placed) == 1 else params

    def _parts(self, params: Any) -> list[Any]:
        """Returns the parameters of each replica."""
        if self._mesh is None:
            return [_on_one_device(params)]
        for name, leaf in named_leaves(params).items():
            if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
                raise UserError("params", constraint=f": {name} is on no mesh.")
        if len(self._meshes) == 1:
            return [params]
        return [_on_mesh(params, own) for own in self._meshes]


def _as_placed(new: Any, old: jax.Array) -> jax.Array:
    return _put(new, old.sharding)


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    # NumPy's arrays are copied, as JAX may take their memory: whose they are may change them.
    if not isinstance(leaf, jax.Array):
        leaf = np.array(leaf)
    return jax.device_put(leaf, sharding)


def _on_one_device(params: Any) -> Any:
    """Returns parameters as those of a checkpoint are: arrays that were put on their device, else
    on the first one. Programs for these are others than for arrays that were put nowhere.
    """
    elsewhere = SingleDeviceSharding(jax.local_devices()[0])

    def put(leaf: Any) -> jax.Array:
        sharding = leaf.sharding if isinstance(leaf, jax.Array) else elsewhere
        return _put(leaf, sharding)

    return jax.tree.map(put, params)


def _shapes(params: Any) -> dict[str, str]:
    """Returns type and shape of each parameter, by name."""
    leaves = named_leaves(params).items()
    return {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in leaves}


def replica_meshes(mesh: Mesh) -> list[Mesh]:
    """Returns the mesh of each index along `data`, with all other axes as they are."""
    axis = mesh.axis_names.index(DATA_AXIS)
    meshes = []
    for index in range(mesh.devices.shape[axis]):
        devices = np.take(mesh.devices, [index], axis)
        meshes.append(Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types))
    return meshes


def _on_mesh(params: Any, mesh: Mesh) -> Any:
    """Returns parameters on one replica's part of the mesh that they are on."""

    def place(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree.map(place, params)
