"""Answers in the form of OpenAI's batch interface."""

from collections.abc import Sequence
from typing import Any

from research.data.tokenizers import StreamDecoder, Tokenizer
from research.inference.answers import Answer, Sample
from research.inference.batch_lines import BatchLine
from research.inference.openai_fields import CHAT


def response(line: BatchLine, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """Returns what is written for a line, with a status as of HTTP."""
    content = {"status_code": status, "request_id": f"line-{line.number}", "body": body}
    return {
        "id": f"line-{line.number}",
        "custom_id": line.id,
        "line": line.number,
        "response": content,
        "error": None,
    }


def answer_body(
    line: BatchLine, answer: Answer, samples: Sequence[Sample], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns the body of an answer.

    Args:
      line: that asked.
      answer: that has ended.
      samples: of it that are returned; none of a search.
      tokenizer: of the model.
    """
    is_chat = line.form == CHAT
    choices = []
    for beam in answer.beams or ():
        choices.append((beam.text, beam.finish, {"logprobs": None}))
    for sample in samples:
        completion = sample.completion()
        logprobs = None
        if line.wants_logprobs:
            of_form = _chat_logprobs if is_chat else _completion_logprobs
            logprobs = of_form(sample, tokenizer)
        # A search has no seed. OpenAI's form has no place for that of a sample, and takes more.
        more = {"logprobs": logprobs, "seed": sample.seed}
        choices.append((completion.text, completion.finish, more))

    listed = []
    for index, (text, finish, more) in enumerate(choices):
        content: dict[str, Any] = {"text": text}
        if is_chat:
            content = {"message": {"role": "assistant", "content": text}}
        listed.append({"index": index, **content, **more, "finish_reason": finish})
    drawn = sum(len(sample.completion().tokens) for sample in answer.samples)
    drawn += sum(len(beam.tokens) for beam in answer.beams or ())
    prompt = len(answer.request.ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
    # The time is no part of an answer, which is a function of its line.
    return {
        "id": f"line-{line.number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": line.model,
        "choices": listed,
        "usage": usage,
    }


def _chat_logprobs(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    content = []
    for found in sample.logprobs:
        top = [_entry(tokenizer, *pair) for pair in found.top]
        content.append({**_entry(tokenizer, found.token, found.logprob), "top_logprobs": top})
    return {"content": content}


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = _bytes_of(tokenizer, token)
    values = None if data is None else list(data)
    return {"token": name_of(tokenizer, token), "logprob": logprob, "bytes": values}


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """Returns the text of an id; `token_id:N` where it has none of its own: it ends a text, is part
    of a character, or the model has it and the tokenizer does not. No two ids that a model may draw
    have one name by accident, as the keys of a JSON object must not.
    """
    data = _bytes_of(tokenizer, token)
    try:
        text = "" if data is None else data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    return text or f"token_id:{token}"


def _bytes_of(tokenizer: Tokenizer, token: int) -> bytes | None:
    return tokenizer.bytes_of(token) if token < tokenizer.vocab_size else None


def _completion_logprobs(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    top = []
    for found in sample.logprobs:
        top.append({name_of(tokenizer, token): logprob for token, logprob in found.top})
    return {
        "tokens": [name_of(tokenizer, found.token) for found in sample.logprobs],
        "token_logprobs": [found.logprob for found in sample.logprobs],
        "top_logprobs": top,
        "text_offset": _text_offsets(sample, tokenizer),
    }


def _text_offsets(sample: Sample, tokenizer: Tokenizer) -> list[int]:
    """Returns where in the text of a sample each token begins: of a character in several tokens all
    begin where it does, and what a stop string cuts off begins at the end.
    """
    request = sample.answer.request
    start = sample.sequence.limit - request.max_tokens
    stream = StreamDecoder(tokenizer, sample.sequence.tokens[:start])
    without_text = (*tokenizer.end_ids, *request.sampling.stop_ids)
    length = len(sample.completion().text)
    offsets = []
    offset = 0
    for found in sample.logprobs:
        offsets.append(min(offset, length))
        if found.token not in without_text:
            offset += len(stream.push(found.token))
    return offsets
