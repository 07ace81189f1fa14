"""What the tests of chats share: templates, conversations, and a folder that holds them."""

import json
import pathlib

import tokenizers as hf

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message.role) }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- generation %}{{ message.content | trim }}{% endgeneration %}
{{ '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}{% if thinking is defined %}<think>{% endif %}
{% endif %}"""
LLAMA = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]
{%- else %} {{ message.content }}{{ eos_token }}{% endif %}
{% endfor %}"""
PARTS = (
    "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor "
    "%}<|im_end|>{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "Hello, who are you?"}],
    [
        {"role": "system", "content": "You are naïve.\n\nÜber 東京  "},
        {"role": "user", "content": "  What is 2 < 3 && <b>bold</b>?\n"},
        {"role": "assistant", "content": "True. 😀", "tool_calls": None},
        {"role": "user", "content": "Thanks <"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "a < b & 'c' über", "parameters": {"x": 1}},
    }
]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<pad>"]


def library_json() -> dict:
    """A small byte-level BPE with ChatML's control tokens, one that takes the spaces beside it, and
    one not special.
    """
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        ["user assistant system hello im_start im_end you are the"] * 9, trainer
    )
    tokenizer.add_special_tokens(CONTROL[:5])
    tokenizer.add_special_tokens([hf.AddedToken("<pad>", lstrip=True, rstrip=True, special=True)])
    tokenizer.add_tokens(["<think>"])
    return json.loads(tokenizer.to_str())


def write_folder(path: pathlib.Path, template, **values) -> pathlib.Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(library_json()))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **values,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return path
