"""Samples are printed, kept, and the same for the same seed."""

import re
import shutil

import jax
import pytest

import research
from research import cli
from research.parallel.mesh_axes import MESH_AXES
from tests.recipes.fixtures import Unbroken


def test_samples_are_printed_and_kept(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    argv = ["sample", f"--workdir={workdir}", "--prompt=the cat", "--prompt=12", "--max_tokens=8"]
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert first.startswith("the cat")
    assert "\n\n12" in first
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*argv, "--seed=7"]) == 0
    assert capsys.readouterr().out != first
    # Without the flag the seed is 0, which is said beside the text.
    assert cli.main([*argv, "--seed=0"]) == 0
    assert capsys.readouterr().out == first
    kept = (workdir / "samples.txt").read_text(encoding="utf-8")
    assert kept.count("step 12, SamplingConfig(max_tokens=8") == 4
    assert kept.count("seed=0,") == 3
    assert kept.count(first) == 3


def test_empty_prompt_begins_a_document(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    assert (
        cli.main(
            ["sample", f"--workdir={workdir}", "--prompt=", "--max_tokens=4", "--temperature=0"]
        )
        == 0
    )
    assert capsys.readouterr().out.strip()


def test_samples_that_cannot_be_kept_are_printed_all_the_same(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    (workdir / "samples.txt").mkdir()
    assert cli.main(["sample", f"--workdir={workdir}", "--prompt=the", "--max_tokens=4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the")
    assert "samples.txt cannot be written: Is a directory" in err


def test_beams_are_searched_where_there_is_more_than_one(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    argv = [
        "sample",
        f"--workdir={workdir}",
        "--prompt=the",
        "--prompt=cat",
        "--max_tokens=8",
        "--num_beams=3",
    ]
    assert (
        cli.main([*argv, "--forced_prefix= sat", "--length_penalty=0.5", "--no_repeat_ngram=3"])
        == 0
    )
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("the sat")
    assert second.startswith("cat sat")
    assert "step 12, BeamConfig(num_beams=3" in (workdir / "samples.txt").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--num_beams=3", "--temperature=0.5"],
            "--temperature = 0.5 draws, and num_beams = 3 searches.",
        ),
        (["--num_beams=3", "--stop=x"], "--stop = ('x',) draws, and num_beams = 3 searches."),
        (["--length_penalty=2"], "--length_penalty = 2.0 needs num_beams above 1."),
        (["--num_beams=0"], "--num_beams = 0 must be at least 1."),
        (["--stop_ids=a"], "argument --stop_ids: 'a' must be ids, as in 5,7"),
        (
            ["--logit_bias=5"],
            "argument --logit_bias: '5' must be ids with their biases, as in 5:-1.5,7:2",
        ),
        (
            ["--regex=a", "--choices=b"],
            "grammar: exactly one of json_schema, regex, choices, lark must be given, not 2.",
        ),
        (["--json_schema={"], "--json_schema = '{' is no JSON: "),
        (["--speculate=luck"], "--speculate = 'luck' is not one of 'none', 'lookup', "),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_a_line(flags: list[str], said: str, capsys):
    assert cli.main(["sample", "--workdir=nowhere", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tessera: error: {said}")
    assert err.count("\n") == 1


def sampled(capsys, workdir, *flags: str) -> str:
    capsys.readouterr()
    assert cli.main(["sample", f"--workdir={workdir}", "--max_tokens=12", *flags]) == 0
    return capsys.readouterr().out


def test_guesses_change_no_sample(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    prompt = "--prompt=the cat sat on the cat sat"
    plain = sampled(capsys, workdir, prompt)
    assert sampled(capsys, workdir, prompt, "--speculate=lookup") == plain
    first = ("--speculate=first_layers", "--draft_layers=1")
    assert sampled(capsys, workdir, prompt, *first) == plain
    draft = ("--speculate=draft", f"--draft={unbroken.workdir}")
    assert sampled(capsys, workdir, prompt, *draft) == plain


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--speculate=draft"], "--draft is missing: speculate = 'draft' needs a model."),
        (["--draft=a"], "--draft = 'a' is for speculate = 'draft', not 'none'."),
        (
            ["--draft_layers=1", "--speculate=lookup"],
            "--draft_layers = 1 is for speculate = 'first_layers', not 'lookup'.",
        ),
        (["--draft_layers=-1"], "--draft_layers = -1 must lie in [0, "),
    ],
)
@pytest.mark.parametrize("verb", ["sample", "generate"])
def test_flags_of_other_guesses_are_refused_in_a_line(
    verb: str, flags: list[str], said: str, tmp_path, capsys
):
    (tmp_path / "in.jsonl").touch()
    files = [f"--in={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}"]
    argv = [verb, "--workdir=nowhere", *flags, *(files if verb == "generate" else [])]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tessera: error: {said}")
    assert err.count("\n") == 1


def test_layers_that_guess_are_named_by_their_flag(unbroken: Unbroken, capsys):
    argv = ["sample", f"--workdir={unbroken.workdir}", "--speculate=first_layers"]
    assert cli.main(argv) == 2
    assert "--draft_layers = 0 must lie in [1, 1]" in capsys.readouterr().err


def test_samples_keep_to_grammars_biases_and_stop_ids(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    assert re.fullmatch(
        r"x=[0-9]{3}\n", sampled(capsys, workdir, "--prompt=x=", "--regex=[0-9]{3}")
    )
    choices = ("--choices=yes", "--choices=no")
    assert sampled(capsys, workdir, "--prompt=", *choices).strip() in ("yes", "no")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["a", 7]}')
    found = sampled(capsys, workdir, "--prompt=", f"--json_schema={schema}")
    assert found.strip() in ('"a"', "7")
    assert sampled(capsys, workdir, "--prompt=a", "--logit_bias=98:1e4,99:0") == f"a{12 * 'b'}\n"
    ends = ("--logit_bias=98:1e4", "--stop_ids=98,99")
    assert sampled(capsys, workdir, "--prompt=a", *ends) == "a\n"


def test_samples_on_a_mesh_are_those_of_one_device(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    argv = ["sample", f"--workdir={workdir}", "--prompt=the cat", "--prompt=12", "--max_tokens=8"]
    texts = []
    for sizes in ([], ["--config.mesh.data=2", "--config.mesh.tensor=2"]):
        assert cli.main([*argv, *sizes]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_model_is_loaded_onto_the_first_devices_of_a_mesh(unbroken: Unbroken):
    params = research.load(unbroken.workdir, mesh={"tensor": 2, "fsdp": 2}).params
    kernel = params["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.device_set == set(jax.devices()[:4])
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 16)}
    everywhere = research.load(unbroken.workdir, mesh={"data": -1, "tensor": 2})
    assert dict(everywhere.mesh.shape) == dict.fromkeys(MESH_AXES, 1) | {"data": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"tensor": 4},
            "mesh.tensor = 4 does not divide kv_heads = 2 of layers_0/attention/key/kernel. Use "
            "1 or 2.",
        ),
        (
            {"tensor": 16},
            "mesh.tensor = 16 makes a mesh of 16 devices, and there are 8. Use at most 8.",
        ),
        (
            {"data": 8, "tensor": 2},
            "mesh.data = 8 makes a mesh of 16 devices, and there are 8. Use at most 4.",
        ),
        (
            {"data": 16, "tensor": 16},
            "mesh.data = 16 makes a mesh of 256 devices, and there are 8. Lower mesh.tensor too.",
        ),
        (
            {"pipeline": 2},
            "mesh.pipeline = 2 shards layers in training alone. Use 1, and mesh.tensor or "
            "mesh.data for these devices.",
        ),
        (
            {"context": 2},
            "mesh.context = 2 shards the tokens of a row in training alone. Use 1, and "
            "mesh.tensor or mesh.data for these devices.",
        ),
        (
            {"expert": 2},
            "mesh.expert = 2: no layer of the model has experts. Use 1, and mesh.data or "
            "mesh.fsdp for these devices.",
        ),
        (
            {"data": -1, "tensor": 3},
            "mesh.tensor = 3 does not fit 8 devices (data -1 × tensor 3). Set mesh.tensor = 2 "
            "or 4.",
        ),
        ({"tensors": 2}, "mesh.tensors is not a config field. Did you mean 'tensor'?"),
        ({"tensor": "two"}, "mesh.tensor = 'two' must be a whole number."),
    ],
    ids=str,
)
def test_mesh_that_cannot_be_used_is_refused_in_a_line(
    sizes: dict[str, int], said: str, unbroken: Unbroken, capsys
):
    flags = [f"--config.mesh.{name}={size}" for name, size in sizes.items()]
    assert cli.main(["sample", f"--workdir={unbroken.workdir}", "--prompt=a", *flags]) == 2
    assert capsys.readouterr().err == f"tessera: error: {said}\n"


@pytest.mark.parametrize(
    "flag", ["--config.train.steps=1", "--config.mesh=2", "--config.meshes.data=1"]
)
def test_sample_reads_sizes_of_mesh_axes_and_no_other_config(flag: str, capsys):
    assert cli.main(["sample", "--workdir=nowhere", flag]) == 2
    name, _, _ = flag.partition("=")
    said = f"{name}: sample reads no config, but for --config.mesh.FIELD."
    assert capsys.readouterr().err == f"tessera: error: {said}\n"
