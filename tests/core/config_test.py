"""Configs are bound strictly: a mistake names its field, its value and the constraint."""

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.config import (
    _warn_renamed,
    bind,
    load_file,
    override,
    plain,
    renamed,
    to_json,
)
from research.core.differences import first_difference
from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class WheelConfig:
    radius: float = 1.0
    spokes: int = 32

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise UserError("radius", self.radius, "must be above 0.")


@dataclasses.dataclass(frozen=True)
class CarConfig:
    name: str
    speed: float = 1.0
    seats: int = 4
    electric: bool = False
    colour: Literal["red", "blue"] = "red"
    gear: Literal[1, 2, 3] = 1
    front: WheelConfig = WheelConfig()
    spare: WheelConfig | None = None
    wheels: tuple[WheelConfig, ...] = ()
    size: tuple[int, float] = (1, 2.0)
    owner: str | None = None
    extras: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seats < 1:
            raise UserError("seats", self.seats, "must be at least 1.")


def fails(values: dict[str, Any], cls: type = CarConfig, where: str = "") -> str:
    """Returns the one-line message that refuses `values`."""
    with pytest.raises(UserError) as caught:
        bind(cls, values, where)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def typed(**assignments: str) -> CarConfig:
    """Binds values as the command line gives them, with `__` for the dot."""
    pairs = [(name.replace("__", "."), text) for name, text in assignments.items()]
    return bind(CarConfig, override({"name": "Ada"}, pairs))


def test_unknown_field_is_named_with_the_nearest():
    assert (
        fails({"name": "Ada", "sped": 1.0}) == "sped is not a config field. Did you mean 'speed'?"
    )


def test_unknown_field_of_a_group_is_named_with_its_path():
    message = fails({"name": "Ada", "wheels": [{}, {"spoke": 3}]})
    assert message == "wheels.1.spoke is not a config field. Did you mean 'spokes'?"


def test_field_of_a_group_is_found_where_it_belongs():
    assert "Did you mean 'front.radius'?" in fails({"name": "Ada", "radius": 2.0})


def test_unknown_field_like_no_other_lists_the_known_ones():
    assert (
        fails({"qqqqqq": 1}, WheelConfig) == "qqqqqq is not a config field. Known: radius, spokes."
    )


def test_missing_field_is_named():
    assert fails({}, where="car") == "car.name is missing: it has no default."


@pytest.mark.parametrize(
    ("field", "value", "constraint"),
    [
        ("seats", 2.0, "a whole number"),
        ("seats", "2", "a whole number"),
        ("seats", True, "a whole number"),
        ("speed", "fast", "a finite number"),
        ("speed", False, "a finite number"),
        ("speed", float("nan"), "finite"),
        ("speed", float("inf"), "finite"),
        ("electric", 1, "True or False"),
        ("name", 7, "a string"),
        ("colour", "green", "not one of 'red', 'blue'"),
        ("gear", 4, "not one of 1, 2, 3"),
        ("front", 3, "a group of fields"),
        ("front", None, "a group of fields"),
        ("size", [1], "2 items, not 1"),
        ("size", "12", "a list"),
        ("extras", [1], "a group of fields"),
    ],
)
def test_value_of_another_type_is_refused(field: str, value: Any, constraint: str):
    message = fails({"name": "Ada", field: value})
    assert message.startswith(f"{field} = {value!r}")
    assert constraint in message


def test_choices_are_listed_once_and_the_nearest_is_named():
    listed = "is not one of 'red', 'blue'."
    assert fails({"colour": "xyz"}) == f"colour = 'xyz' {listed}"
    assert fails({"colour": "bleu"}) == f"colour = 'bleu' {listed} Did you mean 'blue'?"


def test_near_literal_is_advised():
    assert "Did you mean 'blue'?" in fails({"name": "Ada", "colour": "bleu"})


def test_item_of_a_list_is_named_by_its_index():
    assert fails({"name": "Ada", "size": [1, "x"]}).startswith(
        "size.1 = 'x' must be a finite number"
    )


def test_value_that_the_owner_refuses_is_named_with_its_path():
    assert (
        fails({"name": "Ada", "wheels": [{"radius": -1.0}]})
        == "wheels.0.radius = -1.0 must be above 0."
    )
    assert fails({"name": "Ada", "seats": 0}, where="car") == "car.seats = 0 must be at least 1."


def test_group_whose_name_begins_its_fields_name_is_still_prefixed():
    assert fails({"name": "Ada", "seats": 0}, where="s") == "s.seats = 0 must be at least 1."


def test_values_become_what_their_fields_say():
    car = bind(
        CarConfig,
        {"name": "Ada", "speed": 3, "spare": {"spokes": 8}, "wheels": [{}, {"radius": 2}]},
    )
    assert type(car.speed) is float
    assert car.spare == WheelConfig(1.0, 8)
    assert car.wheels == (WheelConfig(), WheelConfig(2.0))


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("False", False), ("1", True), ("no", False)]
)
def test_typed_words_are_booleans(word: str, value: bool):
    assert typed(electric=word).electric is value


def test_typed_values_are_read_by_the_type_of_their_field():
    car = typed(
        speed="1e3",
        seats="1_000",
        owner="7",
        size="2, 3",
        front__spokes="016",
        extras__lamp="-2",
        colour="blue",
        gear="3",
    )
    assert (car.speed, car.seats, car.owner, car.size) == (1000.0, 1000, "7", (2, 3.0))
    assert (car.front.spokes, car.extras, car.colour, car.gear) == (16, {"lamp": -2}, "blue", 3)


def test_typed_none_empties_an_optional_field_only():
    assert typed(owner="None", spare="none").owner is None
    with pytest.raises(UserError, match="seats = 'None' must be a whole number"):
        typed(seats="None")


@pytest.mark.parametrize("text", ["1e3", "2.0", "", "two", "--2", "0x10"])
def test_typed_value_that_is_no_whole_number_is_refused(text: str):
    with pytest.raises(UserError, match=r"seats = .* must be a whole number"):
        typed(seats=text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "fast"])
def test_typed_value_that_is_no_finite_number_is_refused(text: str):
    with pytest.raises(UserError, match=r"speed = .* must be a finite number"):
        typed(speed=text)


def test_override_replaces_one_item_of_a_list_and_leaves_its_source():
    values = {"name": "Ada", "wheels": [{"spokes": 1}, {"spokes": 2}]}
    car = bind(CarConfig, override(values, [("wheels.1.spokes", "9"), ("wheels.0.radius", "4")]))
    assert car.wheels == (WheelConfig(4.0, 1), WheelConfig(1.0, 9))
    assert values["wheels"] == [{"spokes": 1}, {"spokes": 2}]


def test_override_makes_an_empty_group():
    car = bind(CarConfig, override({"name": "Ada", "spare": None}, [("spare.spokes", "5")]))
    assert car.spare == WheelConfig(1.0, 5)


def test_later_override_wins():
    assert bind(CarConfig, override({}, [("name", "Ada"), ("name", "Bob")])).name == "Bob"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wheels.2.spokes", "'2' is not an index below 1"),
        ("wheels.first", "'first' is not an index below 1"),
        ("name.first", "name is a value, not a group"),
        ("name.first.letter", "'first' is inside a value"),
    ],
)
def test_override_that_leads_nowhere_is_refused(name: str, message: str):
    with pytest.raises(UserError, match=message):
        override({"name": "Ada", "wheels": [{}]}, [(name, "1")])


@st.composite
def hints_and_values(draw: st.DrawFn, depth: int = 2) -> tuple[Any, Any]:
    """A type that a field may have, and a value of it."""
    kinds = ["int", "float", "bool", "str", "literal", "optional"] + [
        "many",
        "pair",
        "dict",
        "group",
    ] * (depth > 0)
    kind = draw(st.sampled_from(kinds))
    scalars = {
        "int": (int, st.integers()),
        "float": (float, st.floats(allow_nan=False, allow_infinity=False)),
        "bool": (bool, st.booleans()),
        "str": (str, st.text(max_size=5)),
        "literal": (Literal["a", "b"], st.sampled_from(["a", "b"])),
        "optional": (int | None, st.none() | st.integers()),
    }
    if kind in scalars:
        hint, values = scalars[kind]
        return hint, draw(values)
    if kind == "group":
        return draw(configs(depth - 1))
    hint, value = draw(hints_and_values(depth - 1))
    if kind == "many":
        return tuple[hint, ...], (value,) * draw(st.integers(0, 3))
    if kind == "pair":
        return tuple[hint, str], (value, "x")
    return dict[str, hint], {"k": value}


@st.composite
def configs(draw: st.DrawFn, depth: int = 2) -> tuple[type, Any]:
    """A frozen dataclass, and an instance of it."""
    fields = draw(st.lists(hints_and_values(depth), min_size=1, max_size=4))
    names = [f"field{i}" for i in range(len(fields))]
    pairs = list(zip(names, [hint for hint, _ in fields], strict=True))
    cls = dataclasses.make_dataclass("AnyConfig", pairs, frozen=True)
    return cls, cls(*[value for _, value in fields])


@settings(deadline=None, max_examples=60)
@given(configs())
def test_any_config_survives_the_way_to_json_and_back(pair: tuple[type, Any]):
    cls, config = pair
    assert bind(cls, plain(config)) == config
    assert bind(cls, json.loads(to_json(config))) == config


@settings(deadline=None, max_examples=60)
@given(
    st.builds(
        CarConfig,
        name=st.text(max_size=5),
        speed=st.floats(allow_nan=False, allow_infinity=False),
        seats=st.integers(min_value=1),
        electric=st.booleans(),
        size=st.tuples(st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    )
)
def test_any_value_can_be_typed(car: CarConfig):
    texts = {
        name: str(getattr(car, name)) for name in ("name", "speed", "seats", "electric", "size")
    }
    assert bind(CarConfig, override({}, list(texts.items()))) == car


def test_first_difference_is_named():
    a = plain(CarConfig("Ada", wheels=(WheelConfig(),)))
    b = plain(CarConfig("Ada", front=WheelConfig(spokes=3), wheels=(WheelConfig(),)))
    assert first_difference(a, a) is None
    assert first_difference(a, b) == "front.spokes"
    assert first_difference({"x": {"y": 1}}, {"x": {"y": 1, "z": 2}}) == "x.z"
    assert first_difference({"x": {"y": 1}, "w": 0}, {"x": {"y": 1}}) == "w"
    assert first_difference({"x": [1, 2]}, {"x": [1, 3]}) == "x"


CONFIG_FILE = """
import ml_collections

def get_config(size="small"):
    return ml_collections.ConfigDict(
        {"name": size, "wheels": ({"spokes": 3},), "front": {"radius": 2.0}}
    )
"""


def test_config_file_is_read_with_its_argument(tmp_path):
    path = tmp_path / "car.py"
    path.write_text(CONFIG_FILE)
    assert bind(CarConfig, load_file(str(path))).name == "small"
    car = bind(CarConfig, load_file(f"{path}:large"))
    assert (car.name, car.wheels, car.front) == (
        "large",
        (WheelConfig(spokes=3),),
        WheelConfig(2.0),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "cannot be run"),
        (
            "import no_such_module",
            "cannot be run: line 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("x = 1", "has no get_config"),
        ("def get_config(): return {}", "must return an ml_collections.ConfigDict"),
    ],
)
def test_config_file_that_gives_no_config_is_refused(tmp_path, text: str, message: str):
    path = tmp_path / "car.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_file(str(path))
    assert "car.py" in str(caught.value)


def test_config_file_that_is_not_there_or_takes_no_argument_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        load_file(str(tmp_path / "none.py"))
    path = tmp_path / "car.py"
    path.write_text("def get_config(): return None")
    with pytest.raises(UserError, match=r"car.py:large.*positional argument"):
        load_file(f"{path}:large")


def test_what_a_config_file_refuses_is_named_with_the_file_and_its_argument(tmp_path):
    path = tmp_path / "car.py"
    path.write_text(
        "from research.core.errors import UserError\n"
        "def get_config(size):\n"
        "    raise UserError(f'size = {size!r} is not a car.')\n"
    )
    with pytest.raises(UserError) as caught:
        load_file(f"{path}:99b")
    assert str(caught.value) == f"config = '{path}:99b': size = '99b' is not a car."


@dataclasses.dataclass(frozen=True)
class RenamedConfig:
    depth: int = renamed("num_future", default=0)


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    head: RenamedConfig = RenamedConfig()


def test_a_former_name_of_a_field_is_accepted_and_warned_about_once(caplog):
    _warn_renamed.cache_clear()
    with caplog.at_level("WARNING", "tessera"):
        bound = [bind(OuterConfig, {"head": {"num_future": n}}) for n in (2, 3)]
    assert [config.head.depth for config in bound] == [2, 3]
    said = "head.num_future is called head.depth now; the former name is still read"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_former_name_takes_an_override_from_the_command_line():
    values = override({}, [("head.num_future", "4")])
    assert bind(OuterConfig, values) == OuterConfig(RenamedConfig(4))


@pytest.mark.parametrize(("file", "flag"), [("num_future", "depth"), ("depth", "num_future")])
def test_the_command_line_overrides_the_file_under_either_name(file: str, flag: str):
    values = override({"head": {file: 1}}, [(f"head.{flag}", "4")])
    assert bind(OuterConfig, values) == OuterConfig(RenamedConfig(4))


def test_former_name_beside_the_new_one_is_refused():
    with pytest.raises(UserError, match=r"^head\.num_future is the former name of depth, which"):
        bind(OuterConfig, {"head": {"num_future": 1, "depth": 2}})
