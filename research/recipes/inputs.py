"""The data of a run: tokenizer, corpora, and batches of them."""

import logging
from collections.abc import Iterator

from research.core.backend import cache_folder
from research.core.errors import UserError, within
from research.data.batch import Batch
from research.data.loader import Loader, heldout_batches
from research.data.objectives import special_ids
from research.data.prepare import Prepared, prepare
from research.recipes.experiment import ExperimentConfig

logger = logging.getLogger("tessera")


def prepare_data(config: ExperimentConfig) -> Prepared:
    """Returns the run's tokenizer and corpora, built or reused.

    Raises:
      UserError: the data cannot be used, none of it is held out, or the tokenizer has more ids than
          the model.
    """
    with within("data"):
        prepared = prepare(config.data, cache_folder() / "data")
    for line in prepared.report():
        logger.info("data: %s", line)

    # What the model's config must agree with.
    if prepared.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            "model.vocab_size",
            config.model.vocab_size,
            f"is below the tokenizer's {prepared.tokenizer.vocab_size} ids. Use at least that.",
        )
    if config.model.structure == "encoder_decoder":
        start = special_ids(config.data.objective, prepared.tokenizer).decoder_start
        if start != config.model.decoder_start_id:
            raise UserError(
                "model.decoder_start_id",
                config.model.decoder_start_id,
                f"is not the id {start} that data.objective.decoder_start = "
                f"{config.data.objective.decoder_start!r} begins the decoder with. Make them "
                "agree.",
            )

    # Evaluation needs held-out text.
    if not any(corpus.num_documents for corpus in prepared.heldout):
        raise UserError(
            "data.sources",
            constraint=": no document is held out; raise heldout_fraction or add text.",
        )
    return prepared


def make_loader(
    config: ExperimentConfig, prepared: Prepared, part: tuple[int, int] = (0, 1)
) -> Loader:
    """Returns the training batches, from the first one: part i of n of each, from
    `parallel.rules.process_rows`.
    """
    loader = Loader(
        prepared.train,
        config.data,
        prepared.tokenizer,
        batch_size=config.train.batch_size,
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
        part_index=part[0],
        part_count=part[1],
    )
    logger.info(
        "data: %s rows an epoch, %.2f %% padding",
        f"{loader.rows_per_epoch:,}",
        100 * loader.padding,
    )
    if loader.dropped:
        logger.warning("data: %s pairs are left out: too long for a row", f"{loader.dropped:,}")
    return loader


def heldout_rows(
    config: ExperimentConfig, prepared: Prepared, part: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """Yields part i of n of the held-out batches, `train.eval_batches` of them at most."""
    return heldout_batches(
        prepared.heldout,
        config.data,
        prepared.tokenizer,
        batch_size=config.train.batch_size,
        sequence_length=config.train.sequence_length,
        part_index=part[0],
        part_count=part[1],
        # 0 is all of them.
        max_batches=config.train.eval_batches or None,
    )
