"""Identity: the key file is private, whole and its owner's, or it is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.dht.identity import Identity, IdentityError, peer_id_of, public_key_of, verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "identity.key"


def test_an_identity_survives_a_restart(path: Path) -> None:
    assert Identity.load_or_create(path).peer_id == Identity.load_or_create(path).peer_id


def test_two_homes_have_two_identities(tmp_path: Path) -> None:
    assert Identity.load_or_create(tmp_path / "a").peer_id != Identity.load_or_create(tmp_path / "b").peer_id


def test_the_file_has_the_form_that_libp2p_reads(path: Path) -> None:
    peer_id = Identity.load_or_create(path).peer_id
    content = path.read_bytes()
    assert content[:4] == bytes.fromhex("08011240") and len(content) == 68
    assert base58.b58decode(peer_id) == bytes.fromhex("002408011220") + content[36:]


def test_the_key_in_the_libp2p_specification_is_accepted(path: Path) -> None:
    # peer-ids/peer-ids.md, test vectors, Ed25519.
    content = bytes.fromhex(
        "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    path.touch(mode=0o600)
    path.write_bytes(content)
    assert public_key_of(Identity.load(path).peer_id) == content[36:]


def test_the_file_is_readable_by_its_owner_alone_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        Identity.load_or_create(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_creating_leaves_no_temporary_file(path: Path) -> None:
    Identity.load_or_create(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_file_that_others_can_open_is_refused(path: Path, mode: int) -> None:
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"mode {mode:04o}.*chmod 600"):
        Identity.load(path)


def test_a_missing_file_is_not_made_by_load(path: Path) -> None:
    with pytest.raises(IdentityError, match="no identity file"):
        Identity.load(path)
    assert not path.exists()


def test_every_truncation_is_refused(path: Path) -> None:
    Identity.load_or_create(path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(IdentityError, match="damaged"):
            Identity.load_or_create(path)


def test_a_longer_file_is_refused(path: Path) -> None:
    Identity.load_or_create(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(IdentityError, match="damaged"):
        Identity.load(path)


def test_every_flipped_byte_is_refused(path: Path) -> None:
    Identity.load_or_create(path)
    content = bytearray(path.read_bytes())
    for index in range(len(content)):
        content[index] ^= 1
        path.write_bytes(content)
        with pytest.raises(IdentityError, match="damaged"):
            Identity.load(path)
        content[index] ^= 1


def test_an_rsa_identity_as_hivemind_makes_is_refused(path: Path) -> None:
    path.write_bytes(b"\x08\x00\x12\xa8\x09" + b"\x30" * 1192)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="not an Ed25519 key"):
        Identity.load(path)


def test_a_folder_or_a_fifo_under_the_name_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(IdentityError, match="not a regular file"):
        Identity.load_or_create(tmp_path / "fifo")
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(IdentityError, match="not a regular file"):
        Identity.load_or_create(tmp_path / "folder")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="check that its folder exists"):
        Identity.load_or_create(tmp_path / "no" / "identity.key")


def test_a_dangling_link_is_refused_and_not_followed(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(IdentityError):
        Identity.load_or_create(path)
    assert not (path.parent / "elsewhere").exists()


def test_a_signature_is_accepted_for_its_message_and_signer_only(tmp_path: Path) -> None:
    alice, bob = Identity.load_or_create(tmp_path / "a"), Identity.load_or_create(tmp_path / "b")
    signature = alice.sign(b"message")
    assert verify(alice.peer_id, signature, b"message")
    assert not verify(alice.peer_id, signature, b"massage")
    assert not verify(bob.peer_id, signature, b"message")
    assert not verify(alice.peer_id, signature[:-1], b"message")
    assert not verify(alice.peer_id, signature + b"\0", b"message")


@pytest.mark.parametrize("decorate", [" {}", "{} ", "{}\n", "1{}", "{}1", "{}\0"])
def test_a_peer_id_with_anything_around_it_is_no_name(tmp_path: Path, decorate: str) -> None:
    identity = Identity.load_or_create(tmp_path / "a")
    assert not verify(decorate.format(identity.peer_id), identity.sign(b"m"), b"m")


@given(peer_id=st.text(max_size=60), signature=st.binary(max_size=80), message=st.binary(max_size=80))
def test_verify_answers_no_to_noise(peer_id: str, signature: bytes, message: bytes) -> None:
    assert not verify(peer_id, signature, message)


@given(public=st.binary(min_size=32, max_size=32), signature=st.binary(min_size=64, max_size=64))
def test_verify_answers_no_to_a_signature_of_nobody(public: bytes, signature: bytes) -> None:
    assert not verify(peer_id_of(public), signature, b"message")


@pytest.mark.parametrize("value", [None, 1, b"12D3KooW", ["x"]])
def test_verify_answers_no_to_what_is_not_text(value: object) -> None:
    assert not verify(value, b"\0" * 64, b"m")  # type: ignore[arg-type]


def test_identity_addresses_and_presence_import_neither_hivemind_nor_torch() -> None:
    program = (
        "import sys, tapestry.dht.identity, tapestry.dht.addresses, tapestry.dht.presence;"
        "sys.exit(', '.join({'hivemind', 'torch'} & set(sys.modules)) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
