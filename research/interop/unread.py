"""Fields of config.json that no model of `transformers` computes logits with: tools and generation
leave them there.
"""

import re

_NAMES = {
    # Which implementation runs, and what is returned beside the logits.
    "attn_implementation",
    "use_flash_attn",
    "_flash_attn_2_enabled",
    "gradient_checkpointing",
    "torchscript",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "keys_to_ignore_at_inference",
    "pretraining_tp",
    "tf_legacy_loss",
    "use_bfloat16",
    "cache_implementation",
    # Where the files came from, and the code beside them, which is not run.
    "_commit_hash",
    "_from_model_config",
    "auto_map",
    "transformers.js_config",
    "model_max_length",
    "tokenizer_name",
    # Heads of other tasks.
    "_num_labels",
    "num_labels",
    "finetuning_task",
    "classifier_dropout",
    "classif_dropout",
    "output_past",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    # How texts are generated, in folders from before generation_config.json.
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "max_time",
    "do_sample",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "penalty_alpha",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "exponential_decay_length_penalty",
    "prefix",
    "force_bos_token_to_be_generated",
}
_PATTERNS = re.compile(
    r"_(attn|experts)_implementation(_\w+)?|unsloth_\w+|\w+_token_(id|ids|index)"
)


def is_unread(name: str) -> bool:
    """Returns whether a field, of an architecture that gives it no meaning of its own, changes no
    logit.
    """
    if name in _NAMES:
        return True
    return _PATTERNS.fullmatch(name) is not None


def is_off(value: object) -> bool:
    """Returns whether a field of this value asks for nothing: `null`, `false`, 0, or what is
    empty.
    """
    off = (None, False, "", [], {})
    return value in off
