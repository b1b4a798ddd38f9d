"""Who a node is: an Ed25519 key in a file, and the peer id that contains its public half.

The file has the form that libp2p's daemon reads, protobuf `PrivateKey(key_type=Ed25519, data=private32 ||
public32)`, and the peer id is base58btc of an identity multihash over protobuf `PublicKey`
(libp2p specs, peer-ids/peer-ids.md). Both messages have a fixed length, so their few bytes of framing are
written out here and compared exactly. Because the peer id holds the public key, a signature is checked with
nothing but the peer id of its signer.

Must not import hivemind or torch: the command line reads identities and has to answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# protobuf: field 1 (key_type) = 1 (Ed25519); field 2 (data), 64 bytes.
_PRIVATE_PREFIX = bytes.fromhex("08011240")
# protobuf: field 1 (key_type) = 1 (Ed25519); field 2 (data), 32 bytes.
_PUBLIC_PREFIX = bytes.fromhex("08011220")
# multihash: function 0 (identity), 36 bytes of digest, which are the PublicKey message itself.
_PEER_ID_PREFIX = bytes.fromhex("0024") + _PUBLIC_PREFIX

_KEY_BYTES = 32
_FILE_BYTES = len(_PRIVATE_PREFIX) + 2 * _KEY_BYTES
_PEER_ID_BYTES = len(_PEER_ID_PREFIX) + _KEY_BYTES
# 38 bytes that begin 00 24 08 01 12 20 take exactly this many base58 characters.
_PEER_ID_CHARS = 52

# What file systems without hard links say: FAT, some network and container ones.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_RESTORE = "restore it from a backup, or move it away to get a new identity"


class IdentityError(Exception):
    """The identity file cannot be used; the message is one line that says why and what to do."""


class Identity:
    """A node's key pair. `peer_id` is its public name, `sign` proves that a message is its own."""

    __slots__ = ("_private_key", "peer_id")

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.peer_id: str = peer_id_of(private_key.public_key().public_bytes_raw())

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """Load the identity at `path`; make a new one when there is no file. Raises IdentityError."""
        if os.path.lexists(path):
            return cls.load(path)
        private_key = Ed25519PrivateKey.generate()
        try:
            _create_file(Path(path), _encode_file(private_key))
        except FileExistsError:  # another process of the same home was quicker: its key is the identity
            return cls.load(path)
        except OSError as error:
            raise IdentityError(
                f"cannot create the identity file {path}: {error.strerror}; check that its folder exists and "
                f"is writable"
            ) from error
        return cls(private_key)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Identity:
        """Load the identity at `path`. Raises IdentityError when it is missing, exposed or damaged."""
        return cls(_decode_file(path, _read_private_file(path)))

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature (64 bytes) of `message`."""
        return self._private_key.sign(message)


def verify(peer_id: str, signature: bytes, message: bytes) -> bool:
    """Whether `signature` over `message` was made by the owner of `peer_id`. Hostile input gives False."""
    if public_key_of(peer_id) is None or (key := _key_of(peer_id)) is None:
        return False
    try:
        key.verify(signature, message)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def peer_id_of(public_bytes: bytes) -> str:
    """The peer id (52 base58 characters) of an Ed25519 public key (32 bytes)."""
    return base58.b58encode(_PEER_ID_PREFIX + public_bytes).decode("ascii")


def public_key_of(peer_id: str) -> bytes | None:
    """The Ed25519 public key (32 bytes) inside `peer_id`; None unless it is exactly the canonical form."""
    if not isinstance(peer_id, str) or len(peer_id) != _PEER_ID_CHARS or not peer_id.isascii():
        return None
    return _decoded(peer_id)


@functools.lru_cache(maxsize=4096)  # a chain asks for the same few again and again, and base58 is slow
def _decoded(peer_id: str) -> bytes | None:
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        return None
    if len(raw) != _PEER_ID_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        return None
    public_bytes = raw[len(_PEER_ID_PREFIX) :]
    # b58decode drops surrounding white space: only the text that encodes back to itself is a name.
    return public_bytes if peer_id_of(public_bytes) == peer_id else None


@functools.lru_cache(maxsize=4096)
def _key_of(peer_id: str) -> Ed25519PublicKey | None:
    public_bytes = public_key_of(peer_id)
    try:
        return None if public_bytes is None else Ed25519PublicKey.from_public_bytes(public_bytes)
    except ValueError:
        return None


def _create_file(path: Path, content: bytes) -> None:
    """Make `path` appear whole and durable, mode 0600, or not at all. Raises FileExistsError if it exists.

    The content is synced under a temporary name first; link() then refuses to replace a file, which rename()
    would not.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _write_new(path, content)
    finally:
        os.unlink(temporary)
    _sync_folder(path.parent)


def _write_new(path: Path, content: bytes) -> None:
    """Where a file system has no hard links: a file that is torn by a crash is found when it is read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # EINVAL: this file system cannot; the key itself is synced
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_private_file(path: str | os.PathLike[str]) -> bytes:
    try:
        # Non-blocking, so that a FIFO under this name is refused below and does not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise IdentityError(
            f"there is no identity file at {path}; start the node once to make one"
        ) from error
    except OSError as error:
        raise IdentityError(f"cannot read the identity file {path}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IdentityError(f"the identity {path} is not a regular file; remove it or name another")
        if status.st_mode & 0o077:
            raise IdentityError(
                f"the identity file {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}); "
                f"run: chmod 600 {path}"
            )
        return os.read(descriptor, _FILE_BYTES + 1)
    finally:
        os.close(descriptor)


def _encode_file(private_key: Ed25519PrivateKey) -> bytes:
    return _PRIVATE_PREFIX + private_key.private_bytes_raw() + private_key.public_key().public_bytes_raw()


def _decode_file(path: str | os.PathLike[str], content: bytes) -> Ed25519PrivateKey:
    if len(content) != _FILE_BYTES or not content.startswith(_PRIVATE_PREFIX):
        raise IdentityError(
            f"the identity file {path} is damaged or not an Ed25519 key ({_FILE_BYTES} bytes expected); "
            f"{_RESTORE}"
        )
    private_bytes = content[len(_PRIVATE_PREFIX) : -_KEY_BYTES]
    private_key = Ed25519PrivateKey.from_private_bytes(private_bytes)
    if private_key.public_key().public_bytes_raw() != content[-_KEY_BYTES:]:
        raise IdentityError(
            f"the identity file {path} is damaged: its public half does not belong to its private half; "
            f"{_RESTORE}"
        )
    return private_key
