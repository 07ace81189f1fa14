"""One tiny corpus, one config and one unbroken run for all tests of the verbs."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from research.recipes import train as train_recipe
from research.training.program import Program
from research.training.state import TrainState
from tests.recipes import runs


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps tokenizers and corpora of the tests that follow out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def shared_programs() -> Iterator[None]:
    """Runs of one config in a file of tests share its program: tracing and compiling it is most of
    their time.
    """
    build, programs = train_recipe.language_model_program, {}

    def program(*arguments: Any, **options: Any) -> Program:
        key = repr((arguments, options))
        if key not in programs:
            programs[key] = build(*arguments, **options)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_recipe, "language_model_program", program)
        for name in ("compile_train_step", "compile_eval_step"):
            patch.setattr(Program, name, _once(getattr(Program, name)))
        yield


def _once(method: Callable[[Program], Any]) -> Callable[[Program], Any]:
    """Returns a method that does its work once for each program."""
    done: dict[int, tuple[Program, Any]] = {}  # with the program, so that its id stays its own

    def result(self: Program) -> Any:
        if id(self) not in done:
            done[id(self)] = self, method(self)
        return done[id(self)][1]

    return result


@dataclasses.dataclass(frozen=True)
class Unbroken:
    """A run that nothing stopped; nobody writes into its workdir."""

    config: pathlib.Path
    workdir: pathlib.Path
    state: TrainState
    batches: list[bytes]


@pytest.fixture(scope="session")
def tiny(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The config file of a tiny run."""
    folder = tmp_path_factory.mktemp("tiny")
    return runs.write_config(folder, runs.write_corpus(folder / "corpus"))


@pytest.fixture(scope="session")
def unbroken(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """The run of `tiny` to its end."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        batches = runs.record_batches(patch)
        state = runs.run(tiny, workdir)
    return Unbroken(tiny, workdir, state, batches)
