"""Advice for a name that is not known."""

from research.core.errors import UserError, nearest


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
