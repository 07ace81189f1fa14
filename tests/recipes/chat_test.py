"""A chat model's way in, its answers, and its way out: ends, framing and template are those of its
folder.
"""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import research
from research import cli
from research.core.errors import UserError
from research.data import tokenizers as ours
from research.data.tokenizers import TokenizerConfig, folders
from research.interop.huggingface import to_hugging_face
from research.recipes.convert import convert
from tests.tiny import random_params, tiny_config

SPECIALS = ("<bos>", "<eos>", "<turn>", "<end_of_turn>")
TEMPLATE = (
    "<bos>{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end_of_turn>{% endfor "
    "%}<turn>assistant"
)
ASKED = [{"role": "user", "content": "Hi<end_of_turn>"}]
GREEDY = {"temperature": 0.0, "max_tokens": 12}


def write_tokenizer(folder, added=SPECIALS, post_processor=None, **settings) -> None:
    """Bytes and special tokens, as a tokenizer.json; `settings` are those of its config."""
    signs = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(signs, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*added])
    if post_processor is not None:
        named = [(name, tokenizer.token_to_id(name)) for name in added]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post_processor, special_tokens=named
        )
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The Hugging Face folder of a small instruct model, whose files name further end tokens."""
    folder = tmp_path_factory.mktemp("chat") / "source"
    config = tiny_config(vocab_size=260, max_length=128)
    params = jax.tree.map(jnp.asarray, random_params(config))
    to_hugging_face(config, params, folder, model_type="llama")
    write_tokenizer(folder, chat_template=TEMPLATE)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"eos_token_id": [257]}))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [257, 259, 258], "top_p": 0.9})
    )
    return folder


@pytest.fixture(scope="module")
def workdir(source):
    target = source.parent / "workdir"
    convert(str(source), str(target), None, None)
    return target


@pytest.fixture(scope="module")
def model(workdir):
    return research.load(workdir)


def test_every_end_token_of_the_folder_is_kept_and_written_again(workdir, model, tmp_path):
    assert model.tokenizer.end_ids == (257, 259, 258)
    convert(str(workdir), str(tmp_path / "back"), "hf", None)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["eos_token_id"] == [257, 259, 258]
    convert(str(tmp_path / "back"), str(tmp_path / "again"), None, None)
    assert research.load(tmp_path / "again").tokenizer.end_ids == (257, 259, 258)


def test_any_end_token_ends_draws_beams_and_answers(model, monkeypatch):
    free = model.generate(["ab"], **GREEDY)[0].tokens
    end = free[3]
    assert end not in free[:3]
    monkeypatch.setattr(model.tokenizer, "further_end_ids", (259, end))
    [drawn] = model.generate(["ab"], **GREEDY)
    assert (drawn.tokens, drawn.finish) == (free[:4], "stop")
    assert drawn.text == model.tokenizer.decode(free[:3])
    [answer] = model.generate(messages=ASKED, **GREEDY)
    assert answer.tokens[-1] in (257, 259, end) or len(answer.tokens) == 12
    [searched] = model.generate(["ab"], num_beams=2, max_tokens=12)
    assert not {257, 259, end} & set(searched.tokens[:-1])


def test_messages_are_the_ids_of_the_template_and_special_tokens_in_them_stay_text(model):
    encode = model.tokenizer.encode
    ids = [256, 258, *encode("user\nHi<end_of_turn>"), 259, 258, *encode("assistant")]
    assert 259 not in encode("Hi<end_of_turn>")
    assert model.generate(messages=ASKED, **GREEDY) == model.generate(ids=[ids], **GREEDY)
    assert model.generate(messages=[ASKED, ASKED], **GREEDY) == model.generate(
        ids=[ids, ids], **GREEDY
    )
    assert model.beams(messages=ASKED, num_beams=2, max_tokens=3) == model.beams(
        ids=[ids], num_beams=2, max_tokens=3
    )


def test_the_command_line_answers_flags_files_and_lines(
    workdir, model, tmp_path, capsys, monkeypatch
):
    own = tmp_path / "run"
    shutil.copytree(workdir, own)
    [wanted] = model.generate(messages=ASKED, **GREEDY)
    argv = ["sample", f"--workdir={own}", "--temperature=0", "--max_tokens=12"]
    assert cli.main([*argv, "--chat", "--prompt=Hi<end_of_turn>"]) == 0
    assert capsys.readouterr().out == wanted.text + "\n"
    (tmp_path / "asked.json").write_text(json.dumps(ASKED))
    assert cli.main([*argv, f"--messages={tmp_path / 'asked.json'}"]) == 0
    assert capsys.readouterr().out == wanted.text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi<end_of_turn>\n\nand?\n"))
    assert cli.main([*argv, "--chat"]) == 0
    second = [
        *ASKED,
        {"role": "assistant", "content": wanted.text},
        {"role": "user", "content": "and?"},
    ]
    [answer] = model.generate(messages=second, **GREEDY)
    assert capsys.readouterr().out == f"{wanted.text}\n{answer.text}\n"
    kept = (own / "samples.txt").read_text(encoding="utf-8")
    assert kept.count('[{"role": "user", "content": "Hi<end_of_turn>"}]\n' + wanted.text) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--messages=nowhere.json"], "--messages = nowhere.json cannot be read"),
        (["--messages={file}"], "must be a list of messages"),
        (
            ["--messages={file}", "--prompt=a"],
            "--messages: its file is the whole conversation; leave out --prompt",
        ),
        (["--system=a"], "--system needs --chat."),
        (["--chat", "--prompt=a"], "has no chat template. Use --prompt alone to continue a text."),
        (
            ["--chat"],
            "--chat: the model of {run} has no chat template. Use --prompt alone to continue a "
            "text.",
        ),
        (
            ["--messages={list}"],
            "--messages: the model of {run} has no chat template. Use --prompt alone",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_line(workdir, tmp_path, capsys, flags, said):
    shutil.copytree(workdir, tmp_path / "run")
    descriptor = json.loads((workdir / "tokenizer" / "descriptor.json").read_text())
    del descriptor["chat_templates"]
    (tmp_path / "run" / "tokenizer" / "descriptor.json").write_text(json.dumps(descriptor))
    (tmp_path / "asked.json").write_text("{}")
    (tmp_path / "list.json").write_text(json.dumps(ASKED))
    names = {
        "file": tmp_path / "asked.json",
        "list": tmp_path / "list.json",
        "run": tmp_path / "run",
    }
    flags = [flag.format(**names) for flag in flags]
    assert cli.main(["sample", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    err = capsys.readouterr().err
    assert said.format(**names) in err
    assert err.startswith("tessera: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "typed", "said"),
    [
        (["--messages={file}"], b"", "text has half a surrogate pair at character"),
        (
            ["--chat"],
            b"Hi \xff\n",
            "standard input is not text: 'utf-8' codec can't decode byte 0xff",
        ),
    ],
)
def test_messages_that_are_not_unicode_are_refused_in_a_line(
    workdir, tmp_path, capsys, monkeypatch, flags, typed, said
):
    (tmp_path / "asked.json").write_text(json.dumps([{"role": "user", "content": "\ud800"}]))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    argv = [flag.format(file=tmp_path / "asked.json") for flag in flags]
    assert cli.main(["sample", f"--workdir={workdir}", "--max_tokens=2", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("tessera: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "is not a workdir: config.json: "),
        ('{"model": 1}', "config.json: model = 1 must be a group of fields."),
        ('{"model": null}', "config.json: model = None must be a group of fields."),
        ('{"model": {}, "source": {}}', "config.json: source.model_type is missing."),
        ('{"model": {}, "source": []}', "config.json: source = [] must be a group of fields."),
        ('{"model": {}, "train": 3}', "config.json: train = 3 must be a group of fields."),
        ('{"model": {}, "data": null}', "config.json: data = None must be a group of fields."),
    ],
)
def test_a_config_file_of_other_json_is_refused_by_name(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        research.load(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("post_processor", "settings", "framed"),
    [
        (None, {}, ([], [])),
        (None, {"add_bos_token": False}, ([], [])),  # Phi-3
        (
            None,
            {"bos_token": None, "eos_token": "<end_of_turn>", "add_bos_token": False},
            ([], []),
        ),  # Qwen
        (None, {"add_bos_token": True}, ([], [])),  # transformers 5 reads the tokenizer.json alone
        ("<bos> $A", {}, ([256], [])),  # LLaMA 3
        ("<bos> $A", {"add_bos_token": False}, ([256], [])),
        ("<bos> $A <eos> <turn>", {}, ([256], [257, 258])),  # a language follows, as mBART's
    ],
)
def test_prompts_are_framed_as_the_model_s_own_tokenizer_does(
    tmp_path, post_processor, settings, framed
):
    write_tokenizer(tmp_path / "hf", post_processor=post_processor, **settings)
    tokenizer = folders.from_folder(tmp_path / "hf")
    before, after = framed
    wanted = [*before, *tokenizer.encode("ab"), *after]
    assert tokenizer.encode_prompt("ab") == tokenizer.encode_source("ab") == wanted
    tokenizer.save(tmp_path / "kept")
    assert ours.load(tmp_path / "kept").encode_prompt("ab") == wanted
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("ab").input_ids == wanted


def test_an_empty_prompt_begins_as_a_document_where_nothing_frames_it(tmp_path):
    write_tokenizer(tmp_path / "hf")
    assert folders.from_folder(tmp_path / "hf").encode_prompt("") == [256]


def test_a_model_trained_here_reads_prompts_as_its_documents_begin(tmp_path):
    write_tokenizer(tmp_path / "hf")
    tokenizer = ours.build(TokenizerConfig("huggingface", path=str(tmp_path / "hf")), ())
    assert tokenizer.encode_prompt("ab") == [256, *tokenizer.encode("ab")]
    assert folders.from_folder(tmp_path / "hf").digest() == tokenizer.digest()


def test_a_workdir_of_an_older_version_ends_with_eos_and_begins_as_a_document(tmp_path):
    write_tokenizer(tmp_path / "hf")
    tokenizer = folders.from_folder(tmp_path / "hf")
    tokenizer.further_end_ids = (259,)
    tokenizer.save(tmp_path / "kept")
    path = tmp_path / "kept" / "descriptor.json"
    descriptor = json.loads(path.read_text())
    assert (descriptor.pop("further_end_ids"), descriptor.pop("prompt_frame")) == ([259], [[], []])
    path.write_text(json.dumps(descriptor))
    older = ours.load(tmp_path / "kept")
    assert (older.end_ids, older.encode_prompt("a")) == ((257,), [256, *older.encode("a")])
    assert older.digest() == tokenizer.digest()


def test_a_tokenizer_with_an_id_more_than_the_embedding_loads_with_a_warning(
    source, tmp_path, caplog
):
    larger = tmp_path / "larger"
    shutil.copytree(source, larger)
    write_tokenizer(larger, added=(*SPECIALS, "<image>"), chat_template=TEMPLATE)
    with caplog.at_level("WARNING", "tessera"):
        convert(str(larger), str(tmp_path / "workdir"), None, None)
    assert [record.message for record in caplog.records if "embedding" in record.message] == [
        "The tokenizer has ids that the model's embedding of 260 rows has not: <image>"
    ]
    model = research.load(tmp_path / "workdir")
    assert (model.tokenizer.vocab_size, model.config.vocab_size) == (261, 260)
    with pytest.raises(
        UserError, match=r"ids: id 260 is out of range: the model's ids lie in \[0, 260\)"
    ):
        model.generate(ids=[[260]], **GREEDY)
    drawn = model.generate(["a"] * 4, temperature=100.0, max_tokens=32)
    assert max(token for text in drawn for token in text.tokens) < 260


def test_a_tokenizer_whose_text_has_more_ids_than_the_embedding_is_refused(source, tmp_path):
    other = tmp_path / "other"
    write_tokenizer(other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"extra{i}": 260 + i for i in range(5)}
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="its vocabulary of 265 does not fit the model's vocab_size = 260"
    ):
        convert(str(source), str(tmp_path / "workdir"), None, str(other))
    assert not (tmp_path / "workdir").exists()
