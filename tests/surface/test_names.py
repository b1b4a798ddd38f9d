"""What members are called: names come from others."""

from __future__ import annotations

from dataclasses import replace

from tapestry.node.protocol.members import NAME_CHARS_MAX, Charter, Roll, Seat, first_roll
from tapestry.node.surface.names import FORMER_MAX, Names

HANOI, LIMA, OSLO, ME = (f"12D3KooW{name}" for name in ("hanoi1", "lima01", "oslo01", "myself"))


def _roll(**names: str) -> Roll:
    return replace(
        first_roll("ab", Charter(), ()), members={p: Seat(name, 1, 0) for p, name in names.items()}
    )


def _learnt(**names: str) -> Names:
    made = Names()
    made.learn(ME, _roll(**names))
    return made


def test_a_member_is_called_by_its_name_and_who_has_none_by_its_id() -> None:
    names = _learnt(**{HANOI: "lab-hanoi", LIMA: "", ME: "lab-oslo"})
    assert [names.call(peer) for peer in (HANOI, LIMA, ME, "12D3KooWforeign")] == [
        "lab-hanoi",
        "…lima01",
        "this node",
        "…oreign",
    ]
    assert (names.name(HANOI), names.name(LIMA), names.name(ME)) == ("lab-hanoi", "", "lab-oslo")


def test_nobody_passes_for_another_by_a_name() -> None:
    names = _learnt(**{HANOI: "lab", LIMA: " lab\n", OSLO: "…hanoi1", ME: ""})
    assert names.call(HANOI) == "lab (…hanoi1)" and names.call(LIMA) == "lab (…lima01)"
    assert names.call(OSLO) == "…hanoi1 (…oslo01)"
    assert _learnt(**{HANOI: "this node"}).call(HANOI) == "this node (…hanoi1)"


def test_a_name_is_one_line_of_bounded_length() -> None:
    names = _learnt(**{HANOI: "a\nb\x1b[31m\u202ec", LIMA: "x" * 1000, OSLO: " \n "})
    assert names.call(HANOI) == "a b?[31m?c"
    assert len(names.call(LIMA)) == NAME_CHARS_MAX
    assert names.call(OSLO) == "…oslo01"


def test_who_was_a_member_is_still_called_so_for_a_while() -> None:
    names = _learnt(**{HANOI: "lab-hanoi", LIMA: "lab-lima"})
    names.learn(ME, _roll(**{LIMA: "lab-lima"}))
    assert names.call(HANOI) == "lab-hanoi" and names.knows(HANOI) and not names.knows(OSLO)
    names.learn(ME, _roll(**{OSLO: "lab-hanoi"}))
    assert names.call(OSLO) == "lab-hanoi" and names.call(HANOI) == "lab-hanoi (…hanoi1)"
    for i in range(FORMER_MAX + 2):
        names.learn(ME, _roll(**{f"peer{i}": f"name{i}"}))
    assert not names.knows(HANOI) and names.knows(f"peer{FORMER_MAX + 1}")
