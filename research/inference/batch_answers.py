"""Answers to lines of a file, as JSON in the form of the line."""

from typing import Any

from research.data.tokenizers import Tokenizer
from research.inference.answers import Answer, Sample, TokenLogprobs
from research.inference.batch_lines import PLAIN, BatchLine
from research.inference.openai_fields import CHAT


def error_value(line: BatchLine, message: str) -> dict[str, Any]:
    """Returns what is written for a line that has no answer."""
    error = {"message": message, "type": "invalid_request_error"}
    if line.form == PLAIN:
        return {"id": line.id, "line": line.number, "error": {"message": message}}
    return _openai(line, 400, {"error": error})


def answer_value(line: BatchLine, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what is written for an answer that has ended."""
    errors = [sample.error for sample in answer.samples if sample.error is not None]
    if answer.error is not None:
        errors.append(answer.error)
    if errors:
        return error_value(line, errors[0])
    if line.form == PLAIN:
        value: dict[str, Any] = {"id": line.id, "line": line.number}
        value["answers"] = _plain_answers(line, answer)
        if answer.request.prompt_logprobs is not None:
            places = sorted(answer.prompt_logprobs)
            value["prompt_logprobs"] = [_plain(answer.prompt_logprobs[each]) for each in places]
        return value
    return _openai(line, 200, _body(line, answer, tokenizer))


def _plain_answers(line: BatchLine, answer: Answer) -> list[dict[str, Any]]:
    found = []
    for beam in answer.beams or ():
        found.append({"text": beam.text, "tokens": list(beam.tokens), "score": beam.score})
    if answer.beams is not None:
        return found
    for sample in answer.best():
        completion = sample.completion()
        value = {
            "text": completion.text,
            "tokens": list(completion.tokens),
            "finish": completion.finish,
            "stop_match": completion.stop_match,
            "seed": sample.seed,
        }
        if line.wants_logprobs:
            value["logprobs"] = [_plain(each) for each in sample.logprobs]
        found.append(value)
    return found


def _plain(found: TokenLogprobs) -> dict[str, Any]:
    value: dict[str, Any] = {"token": found.token, "logprob": found.logprob}
    if found.top:
        value["top"] = [list(pair) for pair in found.top]
    return value


def _openai(line: BatchLine, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"line-{line.number}", "body": body}
    return {
        "id": f"line-{line.number}",
        "custom_id": line.id,
        "line": line.number,
        "response": response,
        "error": None,
    }


def _body(line: BatchLine, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    is_chat = line.form == CHAT
    choices = []
    if answer.beams is not None:
        for beam in answer.beams:
            choices.append((beam.text, beam.finish, None))
    else:
        for sample in answer.best():
            completion = sample.completion()
            logprobs = None
            if line.wants_logprobs:
                of_form = _chat_logprobs if is_chat else _completion_logprobs
                logprobs = of_form(sample, tokenizer)
            choices.append((completion.text, completion.finish, logprobs))

    listed = []
    for index, (text, finish, logprobs) in enumerate(choices):
        content: dict[str, Any] = {"text": text}
        if is_chat:
            content = {"message": {"role": "assistant", "content": text}}
        listed.append({"index": index, **content, "logprobs": logprobs, "finish_reason": finish})
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
        top = [_named(tokenizer, *pair) for pair in found.top]
        content.append({**_named(tokenizer, found.token, found.logprob), "top_logprobs": top})
    return {"content": content}


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}


def _completion_logprobs(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    texts = [tokenizer.decode([found.token]) for found in sample.logprobs]
    offsets = []
    offset = 0
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = []
    for found in sample.logprobs:
        top.append({tokenizer.decode([token]): logprob for token, logprob in found.top})
    return {
        "tokens": texts,
        "token_logprobs": [found.logprob for found in sample.logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }
