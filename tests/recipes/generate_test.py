"""`tessera generate` answers each line of a file once, whatever happens meanwhile."""

import json
import pathlib
import shutil
import signal
import time

import pytest

import research
from research import cli
from research.core.errors import UserError
from research.inference import offline
from research.inference.batch_lines import LineReader
from research.inference.offline import file_digest, in_order, numbered_lines
from research.inference.sampling_config import SamplingConfig
from research.storage.line_log import LineLog
from tests.recipes import runs
from tests.recipes.fixtures import Unbroken


def write_lines(path: pathlib.Path, lines: list) -> pathlib.Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def flags(unbroken: Unbroken, source: pathlib.Path, out: pathlib.Path) -> list[str]:
    return ["generate", f"--workdir={unbroken.workdir}", f"--in={source}", f"--out={out}"]


def read(out: pathlib.Path) -> dict[int, dict]:
    """Returns the answers by line, each of which there is one of."""
    values = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    by_line = {value["line"]: value for value in values}
    assert len(by_line) == len(values)
    return by_line


def answered(unbroken: Unbroken, tmp_path: pathlib.Path, lines: list, *more: str) -> dict:
    source = write_lines(tmp_path / "in.jsonl", lines)
    out = tmp_path / "out.jsonl"
    assert cli.main([*flags(unbroken, source, out), *more]) == 0
    return read(out)


@pytest.fixture(scope="module")
def model(unbroken: Unbroken):
    return research.load(str(unbroken.workdir))


MIXED = [
    {"prompt": "the cat", "max_tokens": 4, "temperature": 0},
    {"id": "b", "prompt": [5, 6, 7], "max_tokens": 3, "seed": 9, "n": 2, "logprobs": 2},
    "",
    {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/completions",
        "body": {
            "model": "m",
            "prompt": "the cat",
            "max_tokens": 4,
            "temperature": 0,
            "stop": None,
        },
    },
    {"prompt": "the cat", "max_tokens": 4, "num_beams": 2, "num_return": 2},
    {"id": 3, "prompt": "x=", "regex": "[0-9]{2}", "max_tokens": 8},
    # The id of another line.
    {"id": "b", "prompt": "the dog", "max_tokens": 3, "prompt_logprobs": 1},
]
BAD = {
    "{": "the line is no JSON",
    '{"prompt": "\\ud800"}': "the line is no JSON",
    '{"prompt": "a", "temperature": NaN}': "NaN is no JSON",
    "[]": "must be a JSON object",
    '{"prompt": "a", "temprature": 1}': "Did you mean 'temperature'?",
    '{"prompt": "a", "max_tokens": 64}': "max_length = 64",
    '{"prompt": [5, 384]}': "384",
    '{"prompt": "a", "ids": [1]}': "exactly one of prompt, ids, messages",
    '{"prompt": "a", "regex": "("}': "regex",
    '{"prompt": "a", "n": "2"}': "n = '2' must be a whole number",
    '{"prompt": "a", "num_beams": 99}': "num_beams = 99 must be at most",
    '{"prompt": "a", "logit_bias": {"x": 1}}': "'x' must be an id",
    '{"id": [], "prompt": "a"}': "id = [] must be text",
    '{"messages": [{"role": "user", "content": "a"}]}': "chat_template",
    '{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}': "'POST'",
    '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}': "prompt is m",
}


def test_lines_of_each_form_are_answered_as_the_model_answers(unbroken: Unbroken, model, tmp_path):
    found = answered(unbroken, tmp_path, MIXED)
    assert sorted(found) == [1, 2, 4, 5, 6, 7]
    [greedy] = model.generate(["the cat"], max_tokens=4, temperature=0.0)
    [plain] = found[1]["answers"]
    assert (found[1]["id"], plain["text"]) == (1, greedy.text)
    assert plain["tokens"] == list(greedy.tokens)
    several = found[2]["answers"]
    drawn = model.generate(ids=[[5, 6, 7]] * 2, max_tokens=3, seeds=[9, 10])
    assert [each["tokens"] for each in several] == [list(each.tokens) for each in drawn]
    assert [each["seed"] for each in several] == [9, 10]
    assert all(len(each["top"]) == 2 for each in several[0]["logprobs"])
    body = found[4]["response"]["body"]
    assert (found[4]["custom_id"], body["model"]) == ("c", "m")
    assert body["choices"][0]["text"] == greedy.text
    assert body["usage"]["completion_tokens"] == len(greedy.tokens)
    [beams] = model.beams(["the cat"], max_tokens=4, num_beams=2, num_return=2)
    assert [each["text"] for each in found[5]["answers"]] == [beam.text for beam in beams]
    assert found[6]["answers"][0]["text"].isdigit()
    assert found[7]["id"] == "b"
    assert len(found[7]["prompt_logprobs"]) == len(model.tokenizer.encode_prompt("the dog")) - 1


def test_a_malformed_line_is_answered_as_an_error_with_its_number(unbroken: Unbroken, tmp_path):
    good = {"prompt": "the", "max_tokens": 2}
    lines = [good, *BAD, good]
    found = answered(unbroken, tmp_path, lines, "--max_tokens=4")
    assert sorted(found) == list(range(1, len(lines) + 1))
    assert "answers" in found[1]
    assert "answers" in found[len(lines)]
    for number, said in enumerate(BAD.values(), 2):
        value = found[number]
        if "custom_id" in value:
            assert value["response"]["status_code"] == 400
            value = value["response"]["body"]
        assert said in value["error"]["message"], value


def test_chats_are_answered_in_the_form_of_chats(model):
    tokenizer = model.tokenizer
    tokenizer.chat_templates = {"default": "{{ messages[0].content }}"}
    reader = LineReader(model.config, tokenizer, {})
    body = {"messages": [{"role": "user", "content": "the"}], "logprobs": True, "top_logprobs": 1}
    body |= {"max_completion_tokens": 3, "response_format": {"type": "json_object"}}
    text = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    line = reader.read(1, json.dumps(text).encode())
    assert line.error is None
    assert line.request.sampling.max_tokens == 3
    assert line.request.grammar.json_schema == '{"type": "object"}'
    body.pop("response_format")
    line = reader.read(1, json.dumps(text).encode())
    written = []
    offline.answer_lines(model.engine(slots=2, tiles=(2,)), tokenizer, [(line, 9)], written.append)
    [choice] = written[0]["response"]["body"]["choices"]
    assert choice["message"]["role"] == "assistant"
    assert [len(each["top_logprobs"]) for each in choice["logprobs"]["content"]] == [1, 1, 1]


def test_defaults_hold_where_a_line_says_nothing(model):
    reader = LineReader(model.config, model.tokenizer, {"max_tokens": 7, "regex": "a*", "seed": 5})
    line = reader.read(2, b'{"prompt": "a"}')
    assert line.request.sampling == SamplingConfig(max_tokens=7, seed=5 + 2 * 2**20)
    assert line.request.grammar.regex == "a*"
    other = reader.read(3, b'{"prompt": "a", "max_tokens": 2, "choices": ["b"], "seed": 1}')
    assert other.request.sampling == SamplingConfig(max_tokens=2, seed=1)
    assert other.request.grammar.given() == {"choices": ("b",)}
    searched = reader.read(4, b'{"prompt": "a", "num_beams": 2, "regex": null}')
    assert searched.error is not None


def test_a_line_without_a_seed_has_that_of_its_number_in_each_form(model):
    reader = LineReader(model.config, model.tokenizer, {})
    body = {"prompt": "a", "max_tokens": 2, "seed": None}
    openai = {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body}
    lines = [body, {"prompt": "a", "max_tokens": 2}, openai]
    read = [reader.read(3, json.dumps(line).encode()) for line in lines]
    assert [line.error for line in read] == [None] * 3
    assert [line.request.sampling.seed for line in read] == [3 * 2**20] * 3


def many(count: int) -> list:
    starts = ("the cat sat on the mat", "12 times", "the", "")
    lines = []
    for index in range(count):
        line = {"id": f"line {index}", "prompt": f"{starts[index % 4]} {index}"}
        lines.append({**line, "max_tokens": 5 + index % 20, "temperature": 1.0})
    lines[3] = "{"
    return lines


@pytest.mark.processes
def test_a_run_that_is_killed_at_any_moment_answers_each_line_once(unbroken: Unbroken, tmp_path):
    lines = many(150)
    whole = answered(unbroken, tmp_path, lines)
    source = tmp_path / "in.jsonl"
    out = tmp_path / "killed.jsonl"
    kills = 0
    for least in (1, 40, 90):
        process = runs.spawn(*flags(unbroken, source, out), devices=1)
        while process.poll() is None and kills < 3:
            if out.exists() and out.read_bytes().count(b"\n") >= least:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
        # What a kill in the middle of a write leaves.
        with out.open("ab") as file:
            file.write(b'{"id": "line 0", "li')
    assert kills == 3
    assert cli.main(flags(unbroken, source, out)) == 0
    assert read(out) == whole


def test_a_run_resumes_after_the_lines_that_are_answered(unbroken: Unbroken, tmp_path):
    lines = many(12)
    whole = answered(unbroken, tmp_path, lines)
    out = tmp_path / "out.jsonl"
    written = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(written[:5]) + written[5][:9], encoding="utf-8")
    assert cli.main(flags(unbroken, tmp_path / "in.jsonl", out)) == 0
    assert read(out) == whole
    assert out.read_text(encoding="utf-8").startswith("".join(written[:5]))
    before = out.read_bytes()
    assert cli.main(flags(unbroken, tmp_path / "in.jsonl", out)) == 0
    assert out.read_bytes() == before


def test_guesses_and_slots_change_no_answer(unbroken: Unbroken, tmp_path):
    lines = many(12)
    whole = answered(unbroken, tmp_path, lines)
    serve = serve_file(tmp_path / "serve.py", slots=3, tiles=(2, 8, 16))
    kinds = {"lookup": [], "draft": [f"--draft={unbroken.workdir}"]}
    for kind, more in kinds.items():
        (tmp_path / kind).mkdir()
        flags_of_kind = (serve, f"--speculate={kind}", *more)
        assert answered(unbroken, tmp_path / kind, lines, *flags_of_kind) == whole


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return err


def test_answers_to_something_else_are_not_added_to(unbroken: Unbroken, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "the", "max_tokens": 2}])
    out = tmp_path / "out.jsonl"
    argv = flags(unbroken, source, out)
    assert cli.main(argv) == 0
    before = out.read_bytes()
    assert "holds answers to something else: defaults.top_k" in refused(capsys, *argv, "--top_k=3")
    write_lines(source, [{"prompt": "a", "max_tokens": 2}])
    assert "holds answers to something else: in differs" in refused(capsys, *argv)
    assert out.read_bytes() == before
    foreign = write_lines(tmp_path / "foreign.jsonl", [{"a": 1}])
    assert "holds something else" in refused(capsys, *flags(unbroken, source, foreign))
    assert "cannot be read" in refused(capsys, *flags(unbroken, tmp_path / "none", out))
    assert "must lie in (0, 1]" in refused(capsys, *argv, "--top_p=2")
    assert "'lookup'" in refused(capsys, *argv, "--speculate=luck")
    for special in ("/dev/full", tmp_path):
        assert "must be a file" in refused(capsys, *flags(unbroken, source, special))


def serve_file(path: pathlib.Path, **fields) -> str:
    path.write_text(
        "import ml_collections\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({fields!r})\n"
    )
    return f"--serve={path}"


def test_answers_of_another_model_are_not_added_to(unbroken: Unbroken, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "the", "max_tokens": 2}])
    out = tmp_path / "out.jsonl"
    argv = flags(unbroken, source, out)
    assert cli.main(argv) == 0
    before = out.read_bytes()
    other = "holds answers to something else: "
    assert f"{other}dtype differs" in refused(capsys, *argv, "--dtype=bfloat16")
    for name, value in {"cache_dtype": "int8", "invariant": False, "top_logprobs": 3}.items():
        serve = serve_file(tmp_path / "serve.py", **{name: value})
        assert f"{other}serve.{name} differs" in refused(capsys, *argv, serve)

    # What says nothing of the answers may change, and where the model lies.
    shutil.copytree(unbroken.workdir, tmp_path / "moved")
    moved = [argv[0], f"--workdir={tmp_path / 'moved'}", *argv[2:]]
    serve = serve_file(tmp_path / "serve.py", slots=3, tiles=(2, 8))
    assert cli.main([*moved, serve, "--speculate=lookup", "--dtype=float32"]) == 0
    assert out.read_bytes() == before
    path = out.with_name("out.jsonl.source.json")
    stored = json.loads(path.read_text())
    for name in ("params", "tokenizer", "step"):
        path.write_text(json.dumps({**stored, name: "0"}))
        assert f"{other}{name} differs" in refused(capsys, *argv)
    stored["model"]["norm"] = "other"
    path.write_text(json.dumps(stored))
    assert f"{other}model.norm" in refused(capsys, *argv)
    assert out.read_bytes() == before


def test_two_processes_do_not_write_one_file(tmp_path):
    with LineLog(tmp_path / "out.jsonl", {"in": 1}) as log:
        log.append({"a": 1})
        with pytest.raises(UserError, match="is being written by another process"):
            LineLog(tmp_path / "out.jsonl", {"in": 1})
        assert list(log.values()) == [{"a": 1}]


@pytest.mark.parametrize("torn", ["", "x", "x" * 200_000])
def test_a_torn_line_is_dropped(tmp_path, torn: str):
    path = tmp_path / "out.jsonl"
    with LineLog(path, {}) as log:
        log.append({"a": 1})
    with path.open("a") as file:
        file.write(torn)
    with LineLog(path, {}) as log:
        assert list(log.values()) == [{"a": 1}]
        log.append({"b": 2})
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'


def test_a_file_is_read_a_window_at_a_time(model, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "WINDOW_LINES", 8)
    reader = LineReader(model.config, model.tokenizer, {"max_tokens": 2})
    written: list[dict] = []
    ahead = []

    def lines():
        for number in range(1, 61):
            ahead.append(number - len(written))
            yield reader.read(number, b'{"prompt": "the"}'), 17

    engine = model.engine(slots=2, tiles=(2,))
    offline.answer_lines(engine, model.tokenizer, lines(), written.append)
    assert sorted(value["line"] for value in written) == list(range(1, 61))
    # A window, and what was waiting and running when it was read.
    assert max(ahead) <= 8 + 2 * 4


def test_long_lines_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "LONGEST_LINE", 10)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a\n" + b"b" * 30 + b"\n\n" + b"c" * 9 + b"\n" + b"d" * 11)
    found = list(numbered_lines(path))
    assert found == [(1, b"a\n"), (2, None), (4, b"c" * 9 + b"\n"), (5, None)]
    digest, count = file_digest(path)
    assert (len(digest), count) == (64, 5)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, mark: bytes):
    path = tmp_path / "in.jsonl"
    path.write_bytes(mark + b"a\n" + mark + b"b\n")
    assert list(numbered_lines(path)) == [(1, b"a\n"), (2, mark + b"b\n")]


def test_lines_that_begin_alike_are_neighbours_and_long_ones_come_first(model):
    reader = LineReader(model.config, model.tokenizer, {})
    shared = list(range(5, 25))
    prompts = [[1], [*shared, 1], [2] * 30, [*shared, 2], [1, 2], [*shared, 1, 1]]
    lines = []
    for number, ids in enumerate(prompts, 1):
        text = json.dumps({"prompt": ids, "max_tokens": 5})
        lines.append(reader.read(number, text.encode()))
    assert [line.number for line in in_order(lines)] == [3, 2, 6, 4, 5, 1]
