"""`tessera convert`: a model's way in and out."""

import io
import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import research
from research import cli
from research.core.errors import UserError
from research.core.trees import named_leaves
from research.data.tokenizers import folders
from research.interop.huggingface import from_hugging_face
from research.recipes import convert as convert_recipe
from research.recipes.convert import convert
from tests.interop import cases
from tests.interop.folders import TOLERANCE, logits_of, write_folder

VOCAB = 260
TEXT = "naïve tiles\n"
TEMPLATE = "{% for message in messages %}<s>{{ message.content }}\r\n ü</s>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder: a small LLaMA and a byte-level tokenizer.json."""
    path = tmp_path_factory.mktemp("source") / "model"
    stored = cases.stored()["llama-3.2-1b"]
    shapes = stored["tensors"] | {"model.embed_tokens.weight": [VOCAB, 64]}
    write_folder(path, stored["config"] | {"vocab_size": VOCAB}, cases.weights(shapes))
    alphabet = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def workdir(folder):
    target = folder.parent / "workdir"
    convert(str(folder), str(target), None, None)
    return target


def test_workdir_has_the_parameters_and_logits_of_its_source(folder, workdir):
    model = research.load(workdir)
    config, params = from_hugging_face(folder)
    assert (model.config, model.step) == (config, 0)
    found, wanted = named_leaves(model.params), named_leaves(params)
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    wanted = logits_of(config, params, cases.tokens())
    np.testing.assert_allclose(model.logits(cases.tokens()), wanted, atol=TOLERANCE)


def test_workdir_has_the_tokenizer_of_its_source(workdir):
    tokenizer = research.load(workdir).tokenizer
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    chat = [{"role": "user", "content": "a</s>"}]
    assert tokenizer.encode_chat(chat) == [
        256,
        *tokenizer.encode("a</s>\n ü"),
        257,
    ]  # Jinja has one end of line


def test_the_way_back_is_bitwise(folder, workdir, tmp_path):
    convert(str(workdir), str(tmp_path / "back"), "hf", None)
    back, source = (
        safetensors.numpy.load_file(path / "model.safetensors")
        for path in (tmp_path / "back", folder)
    )
    assert set(back) == set(source)
    for name in source:
        np.testing.assert_array_equal(back[name], source[name], err_msg=name)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    specials = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert (specials["bos_token"], specials["eos_token"], specials["chat_template"]) == (
        "<s>",
        "</s>",
        TEMPLATE,
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text())["bos_token_id"] == 256


def word_pieces(folder):
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nnai\n##ve\ntiles\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))


def byte_pairs(folder):
    signs = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (folder / "vocab.json").write_text(json.dumps(signs | {"ti": 256, "<|endoftext|>": 257}))
    (folder / "merges.txt").write_text("#version: 0.2\nt i\n")


def sentence_pieces(folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 9),
        model_writer=model,
        vocab_size=16,
        model_type="bpe",
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))


@pytest.mark.parametrize("write", [word_pieces, byte_pairs, sentence_pieces])
def test_a_tokenizer_goes_there_and_back_in_every_form(folder, tmp_path, write):
    source = tmp_path / "source"
    shutil.copytree(folder, source, ignore=shutil.ignore_patterns("tokenizer*"))
    write(source)
    convert(str(source), str(tmp_path / "workdir"), None, None)
    convert(str(tmp_path / "workdir"), str(tmp_path / "back"), "hf", None)
    wanted = folders.from_folder(source)
    held, back = (
        research.load(tmp_path / "workdir").tokenizer,
        folders.from_folder(tmp_path / "back"),
    )
    for tokenizer in (held, back):
        assert tokenizer.encode(TEXT) == wanted.encode(TEXT)
        for name in (
            "vocab_size",
            "bos_id",
            "eos_id",
            "pad_id",
            "unk_id",
            "mask_id",
            "sentinel_ids",
        ):
            assert getattr(tokenizer, name) == getattr(wanted, name), name
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert reference.encode(TEXT, add_special_tokens=False) == wanted.encode(TEXT)


def test_a_target_below_a_file_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"target = .*file/below/model cannot be made"):
        convert(str(folder), str(tmp_path / "file" / "below" / "model"), None, None)


def test_a_target_that_holds_something_is_refused_and_kept(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        convert(str(folder), str(tmp_path), None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_target_is_taken(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(str(folder), str(tmp_path / "empty"), None, None)
    assert (tmp_path / "empty" / "config.json").is_file()


def damaged(folder, path):
    shutil.copytree(folder, path)
    (path / "model.safetensors").write_bytes(b"not tensors")
    return path


def test_a_source_that_fails_leaves_nothing(folder, tmp_path):
    source = damaged(folder, tmp_path / "damaged")
    with pytest.raises(UserError, match="cannot be read"):
        convert(str(source), str(tmp_path / "out"), None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def read_tokenizer_after(act, monkeypatch):
    """Has `act` happen when the new folder is made and the tokenizer is about to be read."""
    read = folders.from_path
    monkeypatch.setattr(folders, "from_path", lambda path: act() or read(path))


def write_arrays_before(act, monkeypatch):
    """Has `act` happen when all is written and the folder has not taken its name."""
    write = convert_recipe.write_params
    monkeypatch.setattr(
        convert_recipe, "write_params", lambda *arguments: write(*arguments) or act()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at_moment", [read_tokenizer_after, write_arrays_before])
def test_a_conversion_that_is_stopped_leaves_nothing(
    folder, tmp_path, number, at_moment, monkeypatch, capsys
):
    made = []

    def stop():
        # The control: there is something to remove.
        made.extend(path.name for path in tmp_path.iterdir())
        signal.raise_signal(number)

    at_moment(stop, monkeypatch)
    status = cli.main(["convert", f"--from={folder}", f"--to={tmp_path / 'out'}"])
    assert status == 128 + number
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("tessera: ")] == said[
        -1:
    ]  # no traceback beside it
    assert [name.startswith(".out.") for name in made] == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_converted_from_before_the_damaged_one(workdir, tmp_path, caplog):
    source = tmp_path / "source"
    shutil.copytree(workdir, source)
    shutil.copytree(source / "checkpoints" / "0", source / "checkpoints" / "7")
    largest = max(
        (source / "checkpoints" / "7" / "arrays" / "d").iterdir(),
        key=lambda path: path.stat().st_size,
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    convert(str(source), str(tmp_path / "out"), "hf", None)
    assert "Trying the one before" in caplog.text
    assert from_hugging_face(tmp_path / "out")[0] == research.load(workdir).config
    shutil.rmtree(source / "checkpoints" / "0")
    with pytest.raises(UserError, match="no checkpoint is intact"):
        convert(str(source), str(tmp_path / "none"), "hf", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_source_s_architecture_is_remembered(workdir):
    assert json.loads((workdir / "config.json").read_text())["source"] == {"model_type": "llama"}


def test_a_folder_becomes_another_folder_of_bfloat16(folder, tmp_path):
    convert(str(folder), str(tmp_path / "out"), "hf", None, "bfloat16")
    found, source = (
        safetensors.numpy.load_file(path / "model.safetensors")
        for path in (tmp_path / "out", folder)
    )
    for name, value in source.items():
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype), err_msg=name)


def test_mistakes_are_named(folder, tmp_path):
    out = str(tmp_path / "out")
    for arguments, message in (
        ((str(folder), out, "tesera", None), "Did you mean 'tessera'"),
        ((str(folder), out, "hf", None, "int8"), "dtype = 'int8' is not known"),
        ((str(folder), out, None, None, "bfloat16"), "dtype = 'bfloat16' needs format = 'hf'"),
        ((str(tmp_path / "none"), out, None, None), "source = .* is neither"),
        (
            (str(folder), out, None, str(folder / "config.json")),
            "config.json is not a tokenizer.json",
        ),
        ((str(folder), out, None, str(tmp_path)), "holds no tokenizer"),
        ((str(folder), out, None, "none.json"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*arguments)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"tokenizer is missing: .*/bare has none of tokenizer\.json, "
    ):
        convert(str(bare), out, None, None)


def test_a_tokenizer_larger_than_the_model_is_refused(folder, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<{i}>" for i in range(3)])
    tokenizer.save(str(tmp_path / "large.json"))
    with pytest.raises(UserError, match="vocabulary of 261 does not fit"):
        convert(str(folder), str(tmp_path / "out"), None, str(tmp_path / "large.json"))


def test_stories260k_tells_the_same_story_in_every_form(shared_data, tmp_path, capsys):
    source = shared_data / "stories260K" / "stories260K.bin"
    forms = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    assert cli.main(["convert", f"--from={source}", f"--to={forms[0]}"]) == 0
    assert cli.main(["convert", f"--from={forms[0]}", f"--to={forms[1]}", "--format=hf"]) == 0
    assert cli.main(["convert", f"--from={forms[1]}", f"--to={forms[2]}"]) == 0
    for workdir in (forms[0], forms[2]):
        arguments = ["--prompt=Once upon a time", "--temperature=0", "--max_tokens=24"]
        assert cli.main(["sample", f"--workdir={workdir}", *arguments]) == 0
        assert "Once upon a time, there was a little girl named Lily." in capsys.readouterr().out


def test_the_command_line_answers_a_mistake_with_one_line(folder, capsys):
    assert cli.main(["convert", f"--from={folder}", f"--to={folder}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
