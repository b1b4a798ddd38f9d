"""Values from outside: what is of its kind comes back as it is, all else is refused with its name."""

from __future__ import annotations

import math

import pytest

from tapestry.node.protocol import strict

GOOD = [
    (strict.integer, 5, (0, 5)),
    (strict.integer, -1, (-1, 0)),
    (strict.boolean, False, ()),
    (strict.finite, 0.5, ()),
    (strict.text, "", (3,)),
    (strict.text, "äbc", (3,)),
    (strict.word, "ab12", (4,)),
    (strict.hexadecimal, "00ff", ((4,),)),
    (strict.hexadecimal, "", ((0, 4),)),
    (strict.sequence, (1, 2), (2,)),
    (strict.sequence, [], (0,)),
    (strict.table, {"a": 1, "b": None}, (("a", "b"),)),
]
BAD = [
    (strict.integer, 6, (0, 5)),
    (strict.integer, True, (0, 5)),
    (strict.integer, 1.0, (0, 5)),
    (strict.boolean, 1, ()),
    (strict.boolean, None, ()),
    (strict.finite, 1, ()),
    (strict.finite, math.nan, ()),
    (strict.finite, math.inf, ()),
    (strict.text, "abcd", (3,)),
    (strict.text, b"ab", (3,)),
    (strict.word, "", (4,)),
    (strict.word, "a b", (4,)),
    (strict.word, "ä", (4,)),
    (strict.word, "abcde", (4,)),
    (strict.hexadecimal, "00FF", ((4,),)),
    (strict.hexadecimal, "00f", ((4,),)),
    (strict.hexadecimal, "00fg", ((4,),)),
    (strict.hexadecimal, b"00ff", ((4,),)),
    (strict.sequence, (1, 2, 3), (2,)),
    (strict.sequence, "ab", (2,)),
    (strict.sequence, {1, 2}, (2,)),
    (strict.table, {"a": 1}, (("a", "b"),)),
    (strict.table, {"a": 1, "b": 2, "c": 3}, (("a", "b"),)),
    (strict.table, [("a", 1)], (("a",),)),
]


@pytest.mark.parametrize(("check", "value", "bounds"), GOOD)
def test_what_is_of_its_kind_comes_back_as_it_is(check, value, bounds):
    assert check(value, *bounds, "it") is value


@pytest.mark.parametrize(("check", "value", "bounds"), BAD)
def test_all_else_is_refused_by_name_and_as_a_value_error(check, value, bounds):
    with pytest.raises(ValueError, match=r"^it must (be|have) ") as refused:
        check(value, *bounds, "it")
    assert isinstance(refused.value, strict.Malformed)


def test_bounds_below_are_kept_too():
    with pytest.raises(strict.Malformed, match="0 or more"):
        strict.finite(-0.1, "a norm", 0.0)
    with pytest.raises(strict.Malformed, match="1 to 3"):
        strict.text("", 3, "a name", 1)
    with pytest.raises(strict.Malformed, match="2 to 2"):
        strict.sequence([1], 2, "a pair", 2)
