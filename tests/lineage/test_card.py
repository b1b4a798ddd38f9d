"""What a model card says of data: whose word it is, and of whom there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from homes import make_home

from tapestry.node.disk.checkpoints import Restoration
from tapestry.node.lineage.card import Contributor, Lineage, members_of, model_card, settings_of
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.lineage.export import _lineage
from tapestry.node.net.descriptions import Descriptions
from tapestry.node.protocol.members import Change
from tapestry.node.protocol.record import Member
from tapestry.node.spec.run import new_spec
from tapestry.node.spec.training import PRESETS

SILENT = "The other members' data are not described here."


@pytest.mark.parametrize(
    ("own", "others", "silent"),
    [
        (("mine (of me, own)",), (), True),
        (("mine (of me, own)",), (("b", ("theirs",)),), False),
        ((), (("b", ("theirs",)),), True),
        ((), (("a", ("first",)), ("b", ("theirs",))), False),
    ],
)
def test_a_card_names_each_ones_word_and_who_said_nothing(own, others, silent) -> None:
    members = (Contributor("a", 0.7, 2), Contributor("b", 0.3, 1))
    lineage = Lineage("ab" * 32, "a run", 3, "cd" * 32, "ef" * 32, members, data=own, others=others)
    card = model_card(lineage, new_spec("a run", PRESETS["nano"]), adapters_apart=False)
    assert (SILENT in card) == silent
    for peer, texts in others:
        assert f"What `{peer}` says of its own, signed by its key:\n\n- {texts[0]}\n" in card
    assert ("- mine (of me, own)" in card) == bool(own)


def test_a_card_says_which_settings_records_changed() -> None:
    spec = new_spec("a run", PRESETS["nano"])
    changes = Change("set", "", "train.lr 0.0005", 9, "0" * 32), Change("admit", "b", "", 9, "1" * 32)
    records = [SimpleNamespace(body=SimpleNamespace(epoch=7, changes=changes))] * 40
    settings = settings_of(records)  # type: ignore[arg-type]
    assert settings == ((7, "train.lr 0.0005"),) * 40
    lineage = Lineage("ab" * 32, "a run", 40, "cd" * 32, "ef" * 32, settings=settings)
    card = model_card(lineage, spec, adapters_apart=False)
    assert "- from epoch 7: `train.lr 0.0005`" in card and "- 8 earlier changes" in card
    assert "changed since" not in model_card(replace(lineage, settings=()), spec, adapters_apart=False)


def test_a_share_is_what_the_records_gave_and_not_what_a_member_says_of_its_tokens() -> None:
    """One that claimed many tokens read 95 %, and weighed a third."""

    def record(*members: tuple[str, int, int]) -> SimpleNamespace:
        return SimpleNamespace(body=SimpleNamespace(members=[Member(p, w, "", "", t) for p, w, t in members]))

    records = [
        record(("a", 1, 10), ("b", 1, 10), ("boasts", 1, 380)),
        record(("a", 3, 10), ("b", 1, 10), ("voter", 0, 0)),
        record(("voter", 0, 0)),
    ]
    members = members_of(records)  # type: ignore[arg-type]
    assert [(one.peer, one.tokens) for one in members] == [("a", 20), ("b", 20), ("boasts", 380)]
    assert [one.share for one in members] == pytest.approx([(1 / 3 + 3 / 4) / 2, (1 / 3 + 1 / 4) / 2, 1 / 6])
    lineage = Lineage("ab" * 32, "a run", 3, "cd" * 32, "ef" * 32, members)
    card = model_card(lineage, new_spec("a run", PRESETS["nano"]), adapters_apart=False)
    assert "| `boasts` | 16.7 % | 380 |" in card and "as it tells" in card
    assert lineage.table()["members"][2] == {"peer": "boasts", "share": 0.166667, "tokens": 380}


def test_an_export_tells_what_other_contributors_signed_and_nothing_else(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(1)
    own, other = made.identities
    chain, run_id = made.chain, made.chain.genesis.run_id
    for identity, text in ((own, "mine"), (other, "theirs")):
        known = Descriptions(made.home.descriptions, run_id, NodeCrypto(identity))
        known.say(identity.peer_id, (text,), 100)
    restored = Restoration(1, made.state.digest(), "")
    assert _lineage(made.home, made.spec, chain, restored).others == ((other.peer_id, ("theirs",)),)
    assert _lineage(made.home, made.spec, chain, Restoration(0, "", "")).others == ()
    made.home.identity_key.unlink()
    said = dict(_lineage(made.home, made.spec, chain, restored).others)
    assert said == {own.peer_id: ("mine",), other.peer_id: ("theirs",)}
