"""How a loaded model makes text."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core import config as configs
from research.core.errors import UserError
from research.inference.answers import Beam
from research.inference.beam_config import BeamConfig
from research.inference.beam_generate import beam_generate
from research.inference.generate import generate
from research.inference.grammar_config import GrammarConfig, bind_grammar
from research.inference.requests import collect_prompts, decoding_config
from research.inference.sampling_config import SamplingConfig
from research.inference.text import Completion
from research.recipes.loaded_engines import EngineMethods


class GenerationMethods(EngineMethods):
    """The methods of `LoadedModel` that make text."""

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        messages: Sequence[Any] | None = None,
        chat: Mapping[str, Any] | None = None,
        sampling: Sequence[SamplingConfig] | None = None,
        seeds: Sequence[Any] | None = None,
        grammar: GrammarConfig | Mapping[str, Any] | None = None,
        speculate: str = "none",
        draft_layers: int = 0,
        draft: EngineMethods | None = None,
        debug_nans: bool = False,
        **fields: Any,
    ) -> list[Completion]:
        """Continues prompts: by sampling, or by beam search where `num_beams` is above 1.

        Exactly one of `prompts`, `ids` and `messages` is given. A text ends at any of the
        tokenizer's `end_ids`.

        Args:
          prompts: texts; the tokenizer adds its own ids before and after each.
          ids: rows of ids, which are used unchanged.
          messages: a conversation, dicts of `role` and `content`, or a list of conversations, for
            the model's chat template; what is generated is the assistant's answer. Special tokens
            in messages stay text.
          chat: further arguments of `Tokenizer.encode_chat`: `tools`, `template`, and the
              template's own variables.
          sampling: settings for each prompt, instead of `fields`; all run in one batch.
          seeds: of sampling, one per prompt; 0, 1, … where neither they nor a `seed` are given.
          grammar: that all texts keep to, or its fields, `{"regex": "[0-9]+"}`; None for none.
          speculate, draft_layers, draft: who guesses, as of `engine`; it changes no text.
          debug_nans: whether the first value that is no number is named, as of `ServeConfig`.
          fields: those of `SamplingConfig`, or of `BeamConfig`.

        Raises:
          UserError: a field that is not known or out of range, or prompts or messages that do not
              fit, or a grammar that no text keeps to.
        """
        if sampling is not None and fields:
            names = ", ".join(sorted(fields))
            raise UserError("sampling", constraint=f": it says all, so {names} must be left out.")

        # Sampling, one for all or one per prompt, or beam search.
        how = decoding_config(fields) if sampling is None else sampling
        read = collect_prompts(self.tokenizer, prompts, ids, messages, chat)
        model = (self.config, self.params, self.tokenizer)
        if isinstance(grammar, Mapping):
            grammar = bind_grammar(grammar)
        if not isinstance(how, BeamConfig):
            smaller = self._smaller(draft, speculate)
            guessing = {"speculate": speculate, "draft_layers": draft_layers, "draft": smaller}
            drawn = {"grammar": grammar, "debug_nans": debug_nans, "mesh": self.mesh}
            return generate(*model, read, how, seeds, **guessing, **drawn)

        _check_search(how, {"seeds": seeds, "grammar": grammar}, speculate)
        # The best hypothesis is the completion.
        searched = beam_generate(*model, read, how, debug_nans=debug_nans, mesh=self.mesh)
        return [best for best, *_ in searched]

    def beams(
        self,
        prompts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        messages: Sequence[Any] | None = None,
        chat: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[list[Beam]]:
        """Returns the `num_return` best continuations of each prompt; `fields` are those of
        `BeamConfig`.

        Args, Raises: as `generate`.
        """
        read = collect_prompts(self.tokenizer, prompts, ids, messages, chat)
        beams = configs.bind(BeamConfig, fields)
        model = (self.config, self.params, self.tokenizer)
        return beam_generate(*model, read, beams, mesh=self.mesh)


def _check_search(beams: BeamConfig, given: Mapping[str, Any], speculate: str) -> None:
    """Raises UserError where a search is given what draws alone have."""
    why = f"num_beams = {beams.num_beams} searches and draws nothing"
    for name, value in given.items():
        if value is not None:
            raise UserError(name, constraint=f": {why}; leave them out.")
    if speculate != "none":
        raise UserError("speculate", speculate, f", and {why}.")
