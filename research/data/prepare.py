"""The data of a run, from its config: a tokenizer and the tokenized corpora."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator

from research.core.config import plain
from research.core.errors import UserError, within
from research.data import tokenizers
from research.data.corpus import Corpus, build_corpora
from research.data.objectives import ObjectiveConfig
from research.data.source_stats import fingerprint
from research.data.sources import SourceConfig, documents
from research.data.tokenizers import Tokenizer, TokenizerConfig
from research.storage import files


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run learns from.

    Attributes:
      sources: where the text comes from; at least one.
      tokenizer: what turns it into ids.
      objective: what is learned from it.
      block_documents: documents that are packed together, at least 1; more leave less padding.
      workers: processes that make batches; 0: threads of this process.
      prefetch: batches that are made ahead, at least 1.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: TokenizerConfig = TokenizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    block_documents: int = 16_384
    workers: int = 0
    prefetch: int = 4

    def __post_init__(self):
        if not self.sources:
            raise UserError("sources", (), "must name at least one source.")
        if all(source.heldout_fraction == 1 for source in self.sources):
            raise UserError(
                "sources",
                constraint=": every source has heldout_fraction = 1.0, so nothing is left to "
                "train on.",
            )
        for index, source in enumerate(self.sources):
            self._check_pairs(index, source)
        for name, least in (("block_documents", 1), ("workers", 0), ("prefetch", 1)):
            value = getattr(self, name)
            if value < least:
                raise UserError(name, value, f"must be at least {least}.")

    def _check_pairs(self, index: int, source: SourceConfig) -> None:
        """Raises UserError where a source has pairs and the objective reads single texts, or the
        other way round.
        """
        name = "pair_path" if source.pair_path else "pair_field"
        value = source.pair_path or source.pair_field
        kind = self.objective.kind
        if (kind == "translate") != bool(value):
            need = "be empty" if value else "name the other text of a pair"
            raise UserError(
                f"sources.{index}.{name}", value, f"must {need} for objective.kind = {kind!r}."
            )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that loaders need; the corpora have the order of `DataConfig.sources`, empty ones
    included.
    """

    tokenizer: Tokenizer
    train: tuple[Corpus, ...]
    heldout: tuple[Corpus, ...]

    def report(self) -> list[str]:
        """Returns a line for each source: what was read, what was skipped, what it became."""
        lines = []
        for train, heldout in zip(self.train, self.heldout, strict=True):
            line = (
                f"{train.folder.parent.name}: {train.num_documents:,} documents, "
                f"{len(train.tokens):,} tokens to train;"
                f" {heldout.num_documents:,} documents, {len(heldout.tokens):,} tokens held out"
            )
            report = train.report
            if report.bad:
                line += f"; {report.bad:,} skipped, first: {report.first_bad}"
            lines.append(line)
        return lines


def prepare(config: DataConfig, folder: str | pathlib.Path) -> Prepared:
    """Builds the tokenizer and the corpora of a run in `folder`, or opens those that an earlier run
    with the same inputs built there.

    Raises:
      UserError: a source or tokenizer that cannot be read, nothing to train on, or a disk that is
          full.
    """
    folder = pathlib.Path(folder)
    tokenizer = prepare_tokenizer(config, folder)
    corpora = []
    for index, source in enumerate(config.sources):
        with within(f"sources.{index}"):
            corpora.append(build_corpora(source, tokenizer, folder / "corpora"))
    prepared = Prepared(
        tokenizer,
        train=tuple(splits["train"] for splits in corpora),
        heldout=tuple(splits["heldout"] for splits in corpora),
    )
    if not any(corpus.num_documents for corpus in prepared.train):
        raise UserError(
            "sources",
            constraint=": no document is left to train on; lower heldout_fraction or add text.",
        )
    return prepared


def check_sources(config: DataConfig) -> None:
    """Raises UserError where a source has no files; none of them is read."""
    for index, source in enumerate(config.sources):
        with within(f"data.sources.{index}"):
            fingerprint(source)


def prepare_tokenizer(config: DataConfig, folder: str | pathlib.Path) -> Tokenizer:
    """Returns the tokenizer of a data config, trained at most once for the same text and kept in
    `folder`.
    """
    if config.tokenizer.kind not in tokenizers.TRAINED:
        with within("tokenizer"):
            return tokenizers.build(config.tokenizer, ())

    # The cache key: everything that decides what it learns from.
    inputs = [plain(config.tokenizer), plain(config.sources)]
    for index, source in enumerate(config.sources):
        with within(f"sources.{index}"):
            inputs.append(fingerprint(source))
    key = json.dumps(inputs, sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    final = pathlib.Path(folder) / "tokenizers" / f"{config.tokenizer.kind}-{digest}"

    files.remove_leftovers(final.parent, older=True)
    if not final.is_dir():
        # Read before `within`: an error of a source is not one of the tokenizer.
        texts = list(training_texts(config))
        with within("tokenizer"):
            tokenizer = tokenizers.build(config.tokenizer, texts)
        try:
            # Another process may have saved the same folder meanwhile: then that one is kept.
            with files.new_folder(final, keep_existing=True) as partial:
                tokenizer.save(partial)
        except OSError as error:
            raise UserError(f"{final} cannot be written: {error.strerror}.") from error
    return tokenizers.load(final)


def training_texts(config: DataConfig) -> Iterator[str]:
    """Yields the documents to train a tokenizer on: about `training_bytes` of them, from each
    source in proportion to its weight.
    """
    sources = [source for source in config.sources if source.heldout_fraction < 1]
    total_weight = sum(source.weight for source in sources)
    for source in sources:
        left = config.tokenizer.training_bytes * source.weight / total_weight
        with within(f"sources.{config.sources.index(source)}"):
            for document in documents(source, "train"):
                yield from document.texts
                left -= sum(len(text.encode("utf-8")) for text in document.texts)
                if left <= 0:
                    break
