"""Chat templates: rendered as the reference renders them, and kept with the tokenizer."""

import json

import pytest

from research.core.errors import Interrupted, UserError
from research.data.tokenizers import (
    TokenizerConfig,
    build,
    folders,
    load,
)
from research.data.tokenizers.chat import render
from tests.data.tokenizers.chats import CHATS, LLAMA, TOOLS


@pytest.mark.live
@pytest.mark.parametrize("name", ["chatml", "llama", "named"])
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_is_rendered_and_encoded_as_transformers_does(sources, made, name, chat):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(sources[name])
    for prompt in (True, False):
        for tools in (None, TOOLS):
            for more in ({}, {"thinking": True}):
                arguments = {"add_generation_prompt": prompt, "tools": tools, **more}
                text = reference.apply_chat_template(chat, tokenize=False, **arguments)
                assert made[name].render_chat(chat, **arguments) == text
                ids = reference.apply_chat_template(chat, return_dict=False, **arguments)
                assert made[name].encode_chat(chat, **arguments) == ids


def test_half_a_surrogate_pair_in_a_conversation_is_refused(made, trained):
    for tokenizer in (made["chatml"], *trained.values()):
        with pytest.raises(UserError, match="text has half a surrogate pair at character"):
            tokenizer.encode_chat([{"role": "user", "content": "a\ud800"}])


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_trained_tokenizers_chat_too_and_keep_their_template(trained, tmp_path, kind):
    tokenizer = trained[kind]
    chat = [{"role": "user", "content": "hello é"}, {"role": "assistant", "content": "a"}]
    wanted = [tokenizer.bos_id, *tokenizer.encode("[INST] hello é [/INST] a"), tokenizer.eos_id]
    assert tokenizer.decode(tokenizer.encode_chat(chat)) == "[INST] hello é [/INST] a"
    assert [
        i for i in tokenizer.encode_chat(chat) if i in (tokenizer.bos_id, tokenizer.eos_id)
    ] == [
        wanted[0],
        wanted[-1],
    ]
    assert tokenizer.encode_chat(chat) == wanted
    before = tokenizer.digest()
    tokenizer.save(tmp_path)
    assert load(tmp_path).chat_templates == {"default": LLAMA}
    assert load(tmp_path).digest() == before


@pytest.mark.parametrize("name", ["chatml", "named"])
def test_an_exported_folder_has_the_same_templates_and_ids(made, tmp_path, name):
    for file, data in folders.to_hugging_face_files(made[name]).items():
        (tmp_path / file).write_bytes(data)
    again = folders.from_folder(tmp_path)
    assert again.chat_templates == made[name].chat_templates
    assert again.specials == made[name].specials
    assert again.encode_chat(CHATS[1], tools=TOOLS) == made[name].encode_chat(CHATS[1], tools=TOOLS)


def test_mistakes_are_one_line(made, trained):
    tokenizer = made["chatml"]
    bare = build(TokenizerConfig(kind="bytes"), ())
    cases = [
        (bare, {"messages": CHATS[0]}, "chat_template is missing"),
        (tokenizer, {"messages": []}, "messages is empty"),
        (tokenizer, {"messages": ["hello"]}, "'hello' must be a dict"),
        (
            tokenizer,
            {"messages": [{"role": "user", "content": b"x"}]},
            "must be a plain JSON value, not bytes",
        ),
        (
            tokenizer,
            {"messages": [{"role": "tool", "content": "x"}]},
            "chat_template: unknown role tool.",
        ),
        (made["named"], {"messages": CHATS[0], "template": "tool"}, "Did you mean 'tool_use'"),
    ]
    for owner, arguments, message in cases:
        for method in (owner.render_chat, owner.encode_chat):
            with pytest.raises(UserError) as caught:
                method(**arguments)
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "Expected"),
        ("{{ messages[0].content.nothing.more }}", "no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{{ strftime_now.__globals__.json }}", "unsafe"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_an_error(made, template, message):
    tokenizer = build(TokenizerConfig(kind="bytes"), ())
    tokenizer.chat_templates = {"default": template}
    with pytest.raises(UserError, match=f"^chat_template: .*({message})"):
        tokenizer.render_chat(CHATS[0])


def test_a_text_with_every_private_character_is_refused(made):
    everything = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(UserError, match="private character"):
        made["chatml"].encode_chat([{"role": "user", "content": everything}])
    kept = [{"role": "user", "content": "\ue000\ue001 <|im_end|> \ue000"}]
    tokenizer = made["chatml"]
    assert tokenizer.decode(tokenizer.encode_chat(kept)) == tokenizer.render_chat(kept)


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("reasoning_content", "m.reasoning_content"),
        ("reasoning", "m['reasoning']"),
        ("thinking", "m.get('thinking')"),
        ("thinking", "m.thinking"),
    ],
)
def test_reasoning_has_the_name_that_the_template_reads(given, name, read):
    tokenizer = build(TokenizerConfig(kind="bytes"), ())
    tokenizer.chat_templates = {
        "default": "{% for m in messages %}{{ m | length }}<"
        + read
        + ">{{ "
        + read
        + " }}{% endfor %}"
    }
    said = tokenizer.render_chat(
        [{"role": "assistant", "content": "Cold.", given: "It is January.</s>"}]
    )
    names = 3 if given == name else 4
    assert said == f"{names}<{read}>It is January.</s>"
    assert tokenizer.eos_id not in tokenizer.encode_chat(
        [{"content": "Cold.", given: "It is January.</s>"}]
    )


def test_reasoning_that_a_message_tells_twice_keeps_both_values():
    tokenizer = build(TokenizerConfig(kind="bytes"), ())
    tokenizer.chat_templates = {
        "default": "{{ messages[0].reasoning }}{{ messages[0].thinking }}{{ "
        "messages[0].reasoning_content }}"
    }
    message = {"role": "assistant", "reasoning": "a", "thinking": "b"}
    assert tokenizer.render_chat([message]) == "abb"
    assert message == {"role": "assistant", "reasoning": "a", "thinking": "b"}
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == ""


def test_named_tokens_are_known_to_templates_and_kept(tmp_path):
    files = folders.to_hugging_face_files(build(TokenizerConfig(kind="bytes"), ()))
    settings = json.loads(files["tokenizer_config.json"])
    settings |= {"extra_special_tokens": {"image_token": "<pad>"}, "video_token": "<s>"}
    settings |= {"chat_template": "{{ image_token }}{{ video_token }}{{ eos_token }}"}
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = folders.from_folder(tmp_path)
    assert tokenizer.encode_chat([{"role": "user"}]) == [258, 256, 257]
    tokenizer.save(tmp_path / "kept")
    assert load(tmp_path / "kept").encode_chat([{"role": "user"}]) == [258, 256, 257]
    back = json.loads(folders.to_hugging_face_files(tokenizer)["tokenizer_config.json"])
    assert back["extra_special_tokens"] == {"image_token": "<pad>", "video_token": "<s>"}


def test_a_stop_while_a_template_is_at_work_is_no_fault_of_the_template():
    def stopped():
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        render("{{ stopped() }}", {"stopped": stopped})
