"""A line of a file cannot keep the others from being answered; its errors use its own names."""

import dataclasses
import json
import math

import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference import batch_answers
from research.inference.answers import TokenLogprobs
from research.inference.batch_answers import answer_value
from research.inference.batch_lines import BatchLine, LineReader
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.offline import answer_lines
from research.inference.openai_answers import name_of
from research.inference.serve_config import ServeConfig
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
# More ids than the tokenizer has.
CONFIG = tiny_config(vocab_size=BYTES.vocab_size + 40, max_length=96)
GOOD = {"prompt": "a", "max_tokens": 3}


@pytest.fixture(scope="module")
def engine() -> Engine:
    serve = ServeConfig(slots=4, tokens=256, rows=16, tiles=(8,))
    return Engine(CONFIG, random_params(CONFIG), BYTES, serve)


@pytest.fixture(scope="module")
def reader() -> LineReader:
    return LineReader(CONFIG, BYTES, {})


def openai(url: str = "/v1/completions", **body) -> dict:
    body = {"prompt": "a", "max_tokens": 4, **body}
    return {"custom_id": "c", "method": "POST", "url": url, "body": body}


def answered(engine: Engine, reader: LineReader, *lines) -> list[dict]:
    """Returns what is written for each line; the lines are values, or texts."""
    read = []
    for number, line in enumerate(lines, 1):
        text = line if isinstance(line, str) else json.dumps(line)
        read.append((reader.read(number, text.encode()), len(text)))
    written: dict[int, dict] = {}

    def write(value: dict) -> None:
        json.dumps(value, allow_nan=False)
        written[value["line"]] = value

    answer_lines(engine, BYTES, read, write)
    return [written[number] for number in range(1, len(lines) + 1)]


def drawn(engine: Engine, reader: LineReader, line: dict):
    """Returns a line with its answer."""
    asked = reader.read(1, json.dumps(line).encode())
    assert asked.error is None, asked.error
    [answer] = engine.run([asked.request])
    return asked, answer


def test_ids_that_the_tokenizer_lacks_have_names(engine: Engine, reader: LineReader):
    [found] = answered(engine, reader, openai(logprobs=20, temperature=0))
    [choice] = found["response"]["body"]["choices"]
    names = {name for top in choice["logprobs"]["top_logprobs"] for name in top}
    beyond = {name for name in names if name.startswith("token_id:")}
    numbers = {int(name.removeprefix("token_id:")) for name in beyond}
    assert max(numbers) >= BYTES.vocab_size
    # Neither ids beyond the tokenizer nor parts of characters share a name.
    assert all(len(top) == 20 for top in choice["logprobs"]["top_logprobs"])


def test_an_id_is_named_by_its_text_alone():
    known = BYTES.vocab_size
    assert name_of(BYTES, ord("a")) == "a"
    others = (0xC3, BYTES.eos_id, known, known + 5)
    assert [name_of(BYTES, i) for i in others] == [f"token_id:{i}" for i in others]


def test_chats_name_the_bytes_of_parts_of_characters(engine: Engine, reader: LineReader):
    asked, answer = drawn(engine, reader, {**GOOD, "logprobs": 1})
    answer.samples[0].logprobs = [TokenLogprobs(0xC3, -1.0, ((CONFIG.vocab_size - 1, -2.0),))]
    asked = dataclasses.replace(asked, form="/v1/chat/completions")
    body = answer_value(asked, answer, BYTES)["response"]["body"]
    [entry] = body["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("token_id:195", [0xC3])
    assert entry["top_logprobs"][0]["bytes"] is None


def test_text_offsets_are_places_in_the_text(engine: Engine, reader: LineReader):
    # A character of two tokens, and a text that is cut off before its stop string.
    line = openai(logprobs=0, regex="aéb!", stop=["b!"], max_tokens=8)
    asked, answer = drawn(engine, reader, line)
    [choice] = answer_value(asked, answer, BYTES)["response"]["body"]["choices"]
    assert choice["text"] == "aé"
    found = choice["logprobs"]
    assert found["tokens"] == ["a", "token_id:195", "token_id:169", "b", "!"]
    assert found["text_offset"] == [0, 1, 1, 2, 2]


def test_both_forms_return_the_best_and_not_the_first(engine: Engine, reader: LineReader):
    asked = {"n": 2, "best_of": 6, "max_tokens": 6, "seed": 3, "temperature": 1.5}
    [plain, other] = answered(engine, reader, {"prompt": "a", **asked}, openai(**asked))
    _, answer = drawn(engine, reader, {"prompt": "a", **asked})
    best = sorted(answer.samples, key=lambda each: -each.mean_logprob())[:2]
    assert best != answer.samples[:2]
    texts = [sample.completion().text for sample in best]
    assert [each["text"] for each in plain["answers"]] == texts
    assert [each["text"] for each in other["response"]["body"]["choices"]] == texts


def test_openai_answers_say_their_seeds_which_give_them_again(engine: Engine, reader: LineReader):
    more = {"max_tokens": 6, "temperature": 1.5}
    [found] = answered(engine, reader, openai(n=2, best_of=4, **more))
    choices = found["response"]["body"]["choices"]
    for choice in choices:
        [again] = answered(engine, reader, openai(seed=choice["seed"], **more))
        assert again["response"]["body"]["choices"] == [{**choice, "index": 0}]
    assert choices[0]["text"] != choices[1]["text"]
    # A search draws nothing, and a chat says its seed beside the message.
    [searched] = answered(engine, reader, openai(num_beams=2, num_return=1))
    assert "seed" not in searched["response"]["body"]["choices"][0]
    asked, answer = drawn(engine, reader, {**GOOD, "seed": 7})
    asked = dataclasses.replace(asked, form="/v1/chat/completions")
    [choice] = answer_value(asked, answer, BYTES)["response"]["body"]["choices"]
    assert (choice["seed"], choice["message"]["role"]) == (7, "assistant")


@pytest.mark.parametrize("form", ["plain", "/v1/completions"])
def test_failed_samples_are_left_out_while_enough_are_left(
    engine: Engine, reader: LineReader, form: str
):
    asked, answer = drawn(engine, reader, {**GOOD, "n": 2, "best_of": 4, "seed": 1})
    asked = dataclasses.replace(asked, form=form)
    order = sorted(answer.samples, key=lambda each: -each.mean_logprob())
    order[0].error = "its logits are not numbers"
    order[3].error = "its logits are not numbers"
    value = answer_value(asked, answer, BYTES)
    listed = value["answers"] if form == "plain" else value["response"]["body"]["choices"]
    assert [each["text"] for each in listed] == [each.completion().text for each in order[1:3]]
    order[1].error = "its logits are not numbers"
    assert "not numbers" in json.dumps(answer_value(asked, answer, BYTES))


def test_a_line_that_cannot_be_answered_is_an_error_of_its_own(
    engine: Engine, reader: LineReader, monkeypatch
):
    real = batch_answers.Answer.best

    def best(answer):
        samples = real(answer)
        if answer.request.count == 2:
            samples[0].logprobs = [TokenLogprobs(5, -math.inf)]
        if answer.request.count == 3:
            raise RuntimeError("of a\nlibrary")
        return samples

    monkeypatch.setattr(batch_answers.Answer, "best", best)
    asked = [{**GOOD, "logprobs": 0, "n": n} for n in (1, 2, 3)]
    first, infinite, broken = answered(engine, reader, *asked)
    assert "answers" in first
    assert "ValueError" in infinite["error"]["message"]
    assert broken["error"]["message"].endswith("RuntimeError: of a library")
    assert broken["line"] == 3


def test_a_line_that_cannot_be_read_is_an_error_of_its_own(
    engine: Engine, reader: LineReader, monkeypatch
):
    def encode(tokenizer, texts):
        if texts == ["boom"]:
            raise RuntimeError("of a library")
        return real(tokenizer, texts)

    real = ByteTokenizer._encode_batch
    monkeypatch.setattr(ByteTokenizer, "_encode_batch", encode)
    broken, good = answered(engine, reader, {"prompt": "boom"}, GOOD)
    assert "RuntimeError: of a library" in broken["error"]["message"]
    assert "answers" in good


def test_a_request_that_an_engine_fails_to_take_is_an_error_of_its_own(
    engine: Engine, reader: LineReader, monkeypatch
):
    def submit(request):
        if request.count == 2:
            raise RuntimeError("of the engine")
        return real(request)

    real = engine.submit
    monkeypatch.setattr(engine, "submit", submit)
    broken, good = answered(engine, reader, {**GOOD, "n": 2}, GOOD)
    assert "RuntimeError: of the engine" in broken["error"]["message"]
    assert "answers" in good


LONG = "9" * 5000
REFUSED = {
    json.dumps({"prompt": "a", "logit_bias": {LONG: 1}}): "letters) must be an id",
    f'{{"prompt": "a", "seed": {LONG}}}': "the line is no JSON",
    json.dumps({"prompt": "a", "temperature": 10**400}): "must be a finite number",
    '{"prompt": "a", "n": 200000}': "n = 200000 must lie in [1, 128]",
    '{"prompt": "a", "n": 0}': "n = 0 must lie in [1, 128]",
    '{"prompt": "a", "best_of": 129}': "best_of = 129 must lie in [n = 1, 128]",
    '{"prompt": "a", "n": 3, "best_of": 2}': "best_of = 2 must lie in [n = 3, 128]",
    '{"prompt": "a", "num_beams": 2, "n": 2}': "n = 2 is of answers that are drawn",
    '{"prompt": "a", "num_beams": 2, "length_penalty": -1e308}': "length_penalty = -1e+308 must",
    '{"prompt": "a", "num_beams": 2, "length_penalty": -30, "max_tokens": 40}': "[-18.73, 18.73]",
    json.dumps({"prompt": [CONFIG.vocab_size]}): f"prompt: id {CONFIG.vocab_size} is out of range",
    '{"prompt": "a", "logprob_kind": "RAW"}': "is no field of a line. Did you mean 'logprobs'?",
    '{"prompt": "a", "zzz": 1}': "is no field of a line. Known: ",
    json.dumps(openai(max_completion_tokens=0)): "max_completion_tokens = 0 must be at least 1",
    json.dumps(openai(n=200)): "n = 200 must lie in [1, 128]",
}


def test_errors_of_lines_use_the_names_that_lines_have(engine: Engine, reader: LineReader):
    good, *found, last = answered(engine, reader, GOOD, *REFUSED, GOOD)
    assert "answers" in good
    assert "answers" in last
    for number, (value, said) in enumerate(zip(found, REFUSED.values(), strict=True), 2):
        assert value["line"] == number
        if "custom_id" in value:
            value = value["response"]["body"]
        message = value["error"]["message"]
        assert said in message
        assert "count" not in message


def test_a_line_may_have_as_many_answers_as_openai_gives(reader: LineReader):
    line = reader.read(1, b'{"prompt": "a", "n": 128}')
    assert line.request.num_samples == 128


def test_scores_of_every_length_penalty_are_finite(engine: Engine, reader: LineReader):
    for penalty in (-18.0, 18.0):
        line = {"prompt": "a", "num_beams": 2, "max_tokens": 40, "length_penalty": penalty}
        [found] = answered(engine, reader, line)
        assert math.isfinite(found["answers"][0]["score"])


def test_a_length_penalty_has_bounds_that_go_by_the_length():
    for tokens, least in ((1, 90.0), (40, 18.0), (4096, 8.0)):
        BeamConfig(max_tokens=tokens, length_penalty=least)
        BeamConfig(max_tokens=tokens, length_penalty=-least)
        with pytest.raises(UserError, match=r"must lie in \[-"):
            BeamConfig(max_tokens=tokens, length_penalty=-least - 10.0)


@pytest.mark.parametrize(
    "name", ["slots", "tokens", "rows", "drafts", "draft_layers", "top_logprobs"]
)
@pytest.mark.parametrize("value", [-1, 2**31])
def test_every_number_of_an_engine_has_bounds(name: str, value: int):
    with pytest.raises(UserError, match=rf"^{name} = {value} must lie in"):
        ServeConfig(**{name: value})


def test_a_line_without_a_request_has_no_other_names():
    assert BatchLine(1, 1).names == {}
