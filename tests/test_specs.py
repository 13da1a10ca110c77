"""Settings as text: what is read, and every way in which they can be wrong."""

import re
from dataclasses import dataclass

import pytest

import backprop_gpu as bp
from backprop_gpu.specs import build, number, parse, values


@dataclass(frozen=True)
class Soup:
    """Takes one setting of each kind; its annotations are types."""

    litres: float
    bowls: int = 2
    hot: bool = False
    name: str = "leek"
    salt: tuple[float, float] = (0.5, 1)
    pepper: float | None = 0.25


# The defaults alone tell the kinds.
TABLE = {
    "soup": Soup,
    "stew": lambda litres, bowls=2, hot=False, salt=(0.5, 1.0): (litres, bowls, hot, salt),
    "water": lambda: "water",
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("soup", ("soup", {})),
        ("soup:litres=1", ("soup", {"litres": "1"})),
        (" soup : litres = 1 , hot=true ", ("soup", {"litres": "1", "hot": "true"})),
        ("soup:salt=0.1/0.9,name=a-b", ("soup", {"salt": "0.1/0.9", "name": "a-b"})),
    ],
)
def test_text_is_a_name_and_settings(text, wanted):
    assert parse("dish", text) == wanted
    assert list(parse("dish", text)[1]) == list(wanted[1])


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (None, "dish is None, not a name"),
        (3, "dish is 3, not a name"),
        (Soup, "not a name"),
        ("", "dish '' has no name"),
        (":litres=1", "has no name"),
        ("soup:", "'' is not key=value"),
        ("soup:litres", "'litres' is not key=value"),
        ("soup:litres=", "'litres=' is not key=value"),
        ("soup:=1", "'=1' is not key=value"),
        ("soup:litres=1,", "'' is not key=value"),
        ("soup:,litres=1", "'' is not key=value"),
        ("soup:litres=1 bowls=2", "'litres=1 bowls=2' is not key=value"),
        ("soup:name=stew:litres", "name has settings of its own"),
        ("soup:litres=1,litres=2", "gives litres twice"),
    ],
)
def test_bad_syntax_is_told_with_its_cure(text, cause):
    with pytest.raises(bp.ConfigError, match=re.escape(cause)) as e:
        parse("dish", text)
    assert e.value.cure
    assert "\n" not in e.value.cause + e.value.cure


def test_values_are_of_the_kind_that_annotation_or_default_says():
    made = build("dish", "soup:litres=2,bowls=3,hot=True,name=onion,salt=1e-1/2,pepper=1", TABLE)
    assert made == Soup(2.0, 3, True, "onion", (0.1, 2.0), 1.0)
    assert [type(x) for x in (made.litres, made.bowls, made.hot, made.pepper)] == [float, int, bool, float]
    stew = build("dish", "stew:litres=2,bowls=3,hot=false,salt=1/2", TABLE)
    assert stew == (2.0, 3, False, (1.0, 2.0))
    assert [type(x) for x in stew] == [float, int, bool, tuple]
    assert build("dish", "soup:litres=2", TABLE) == Soup(2.0)
    assert build("dish", "water", TABLE) == "water"
    assert values("dish soup", {}, Soup) == {}


@pytest.mark.parametrize(
    ("text", "cause", "cure"),
    [
        ("sop", "unknown dish 'sop'", "did you mean 'soup'? known: soup, stew, water"),
        ("soup:bowl=1", "unknown setting of dish soup 'bowl'", "did you mean 'bowls'? known: litres, bowls, hot"),
        ("water:hot=true", "dish water has no settings", "write its name alone"),
        ("soup:litres=much", "dish soup: litres is 'much'", "give a number"),
        ("soup:bowls=2.5", "dish soup: bowls is '2.5'", "give an integer"),
        ("soup:hot=1", "dish soup: hot is '1'", "give true or false"),
        ("soup:salt=1", "dish soup: salt is '1'", "give two numbers, such as 0.9/0.99"),
        ("soup:salt=1/2/3", "dish soup: salt is '1/2/3'", "give two numbers"),
        ("soup:salt=1/x", "dish soup: salt is '1/x'", "give two numbers"),
        ("stew:salt=1", "dish stew: salt is '1'", "give two numbers"),
        ("soup:hot=true", "dish soup lacks litres", "write soup:litres=..."),
        ("stew", "dish stew lacks litres", "write stew:litres=..."),
    ],
)
def test_what_cannot_be_made_is_told_with_its_cure(text, cause, cure):
    with pytest.raises(bp.ConfigError) as e:
        build("dish", text, TABLE)
    assert e.value.cause == cause
    assert e.value.cure.startswith(cure)


def test_text_is_never_evaluated():
    with pytest.raises(bp.ConfigError, match=r"litres is .__import__"):
        build("dish", "soup:litres=__import__('os').getpid()", TABLE)


@pytest.mark.parametrize("value", [0, 1, 0.5, True, "0.5", None, [], float("nan"), float("inf"), 10**400, -1, 2])
@pytest.mark.parametrize(("low_open", "high_open"), [(a, b) for a in (False, True) for b in (False, True)])
def test_numbers_are_finite_and_in_the_range(value, low_open, high_open):
    inside = [0.5] + [0] * (not low_open) + [1] * (not high_open)
    if not isinstance(value, str | list | None) and value in inside:
        found = number("Soup", "salt", value, 0, 1, low_open, high_open)
        assert found == value
        assert type(found) is float
    else:
        with pytest.raises(bp.ConfigError) as e:
            number("Soup", "salt", value, 0, 1, low_open, high_open)
        assert e.value.cause == f"Soup: salt is {value!r}"
        low, high = ("above" if low_open else "from"), ("below " if high_open else "")
        assert e.value.cure == f"give a finite number {low} 0 to {high}1"


def test_a_range_without_end_has_none_in_the_cure():
    with pytest.raises(bp.ConfigError, match=r"a finite number from 2$"):
        number("Soup", "salt", 1, low=2)


def test_what_is_infinite_is_refused_in_any_range():
    with pytest.raises(bp.ConfigError, match="salt is inf"):
        number("Soup", "salt", float("inf"), high_open=False)
