"""Advice for a name that is not known."""

import pickle

import pytest

from research.core.config import Text
from research.core.errors import UserError, nearest, within


def test_near_name_is_advised():
    assert nearest("learning_rat", ["learning_rate", "name"]) == "Did you mean 'learning_rate'?"


def test_far_name_lists_what_is_known_in_order():
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."


def test_names_without_end_are_cut_with_their_count():
    said = nearest("zzz", [f"n{i:06}" for i in range(100_000)])
    assert said.startswith("Known: n000000, n000001, ")
    assert said.endswith(", n000049, … (100,000 in all).")


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


def test_the_path_the_value_and_the_constraint_are_data():
    error = UserError("sources.0.path", "/nowhere", "matches no file.")
    assert (error.field, error.value, error.constraint) == (
        "sources.0.path",
        "/nowhere",
        "matches no file.",
    )
    assert str(error) == "sources.0.path = '/nowhere' matches no file."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("steps", 0, "must be at least 1."), "steps = 0 must be at least 1."),
        (UserError("name", Text("adam"), "is not known."), "name = 'adam' is not known."),
        (UserError("keep_every", None, "must be set."), "keep_every = None must be set."),
        (UserError("path", "a", ": no such file."), "path = 'a': no such file."),
        (UserError("sources", constraint=": no text."), "sources: no text."),
        (UserError("sources", constraint="hold no text."), "sources hold no text."),
        (UserError("the disk is full."), "the disk is full."),
        (
            UserError("steps", 0, "must be at least 1.", "tiny.py"),
            "tiny.py: steps = 0 must be at least 1.",
        ),
    ],
)
def test_an_error_reads_as_one_line(error, said):
    assert str(error) == said
    assert str(pickle.loads(pickle.dumps(error))) == said


def test_a_group_goes_in_front_of_the_field_and_a_file_in_front_of_both():
    with pytest.raises(UserError) as caught, within("data", "tiny.py"), within("sources.0"):
        raise UserError("weight", -1.0, "must be above 0.")
    assert (caught.value.field, caught.value.value, caught.value.origin) == (
        "data.sources.0.weight",
        -1.0,
        "tiny.py",
    )
    assert str(caught.value) == "tiny.py: data.sources.0.weight = -1.0 must be above 0."


def test_a_message_about_no_field_becomes_one_about_its_group():
    with pytest.raises(UserError) as caught, within("data"), within("sources.0"):
        raise UserError("a.txt:3: bad UTF-8.")
    assert caught.value.field == "data.sources.0"
    assert str(caught.value) == "data.sources.0: a.txt:3: bad UTF-8."
    with (
        pytest.raises(UserError, match=r"^config\.json: it is empty\.$") as caught,
        within("", "config.json"),
    ):
        raise UserError("it is empty.")
    assert caught.value.field == ""


def test_a_message_that_says_what_a_file_is_follows_its_name():
    with pytest.raises(UserError, match=r"^a\.json is no list\.$") as caught, within("", "a.json"):
        raise UserError("is no list.")
    assert (caught.value.origin, caught.value.constraint) == ("a.json", "is no list.")
    with pytest.raises(UserError, match=r"^a\.json: the file is no list\.$"), within("", "a.json"):
        raise UserError("the file is no list.")


def test_an_error_of_a_file_is_about_the_field_that_names_it():
    of_file = UserError("eos", 7, "is no token.", "a.json").about("path", "a.json")
    assert (of_file.field, of_file.value) == ("path", "a.json")
    assert str(of_file) == "path = 'a.json': a.json: eos = 7 is no token."
    assert str(UserError("it is empty.").about("path", "b")) == "path = 'b': it is empty."
    assert UserError("kind", 7, "is unknown.").about("path", "b").field == "kind"


def test_a_message_may_give_its_field_another_name_but_no_other_field():
    assert UserError("workdir", "x", "is not a workdir.").text({"workdir": "--workdir"}) == (
        "--workdir = 'x' is not a workdir."
    )
    assert (
        UserError("a.workdir", 1, "is wrong.").text({"workdir": "--workdir"})
        == "a.workdir = 1 is wrong."
    )


def test_a_value_without_end_is_cut():
    said = str(UserError("values", [1] * 100_000, "must be few."))
    assert len(said) < 400
    assert said.endswith("… (300,000 letters) must be few.")
