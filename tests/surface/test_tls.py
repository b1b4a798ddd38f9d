"""The endpoint over TLS, on real loopback sockets: certificates, renewals, and who never ends a handshake."""

from __future__ import annotations

import asyncio
import datetime
import errno
import http.client
import os
import ssl
import urllib.error
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from surface.test_door import View

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.spec.node import NodeConfig
from tapestry.node.surface import tls
from tapestry.node.surface.ask import ask
from tapestry.node.surface.door import DoorLimits
from tapestry.node.surface.http import HttpServer, start_http
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.tls import ServerTls
from tapestry.node.surface.token import Token

QUICK = DoorLimits(connections_max=4, idle_s=0.3, answer_s=5.0, requests_per_s=1e6)


def write_pair(folder: Path, name: str, days: float = 30) -> tuple[Path, Path]:
    """A certificate that names no host of this machine, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=9))
    cert = made.not_valid_after(now + datetime.timedelta(days=days)).sign(key, hashes.SHA256())
    folder.mkdir(exist_ok=True)
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    no_password = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, no_password))
    paths[1].chmod(0o600)
    return paths


def shown_by(server: HttpServer) -> str:
    """Whose certificate a client is shown."""
    pem = ssl.get_server_certificate((server.host, server.port))
    (name,) = x509.load_pem_x509_certificate(pem.encode()).subject
    return str(name.value)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


def with_server(home: Home, use: Callable[[HttpServer, Path], Awaitable[None]], days: float = 30) -> None:
    async def main() -> None:
        cert, key = write_pair(home.path / "pair", "first.example.org", days)
        token = Token.load_or_create(home.http_token)
        secure = ServerTls(cert, key, home.http_cert)
        server = await start_http(View(), Metrics("0.1.0"), "127.0.0.1", 0, token, QUICK, tls=secure)
        try:
            async with asyncio.timeout(20):
                await use(server, cert.parent)
        finally:
            await server.close()

    uvloop.run(main())  # the daemon's loop


def test_a_command_of_this_home_is_answered_over_tls_and_trusts_no_other_certificate(home: Home) -> None:
    async def use(server: HttpServer, _: Path) -> None:
        assert server.url.startswith("https://127.0.0.1:")
        assert await asyncio.to_thread(ask, home, server.url, "/status") == {"epoch": 3}
        other, _ = write_pair(home.path / "other", "other.example.org")
        home.http_cert.write_bytes(other.read_bytes())
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(ask, home, server.url, "/status")

    with_server(home, use)


def test_what_is_not_encrypted_is_not_answered(home: Home) -> None:
    async def use(server: HttpServer, _: Path) -> None:
        with pytest.raises((OSError, http.client.HTTPException)):
            await asyncio.to_thread(ask, home, server.url.replace("https", "http"), "/status")

    with_server(home, use)


def test_who_never_ends_a_handshake_has_a_deadline_and_takes_no_place_from_others(home: Home) -> None:
    async def use(server: HttpServer, _: Path) -> None:
        silent = [await asyncio.open_connection(server.host, server.port) for _ in range(6)]
        assert await asyncio.to_thread(ask, home, server.url, "/status") == {"epoch": 3}
        for reader, writer in silent:
            assert await reader.read() == b""  # within idle_s, or this test's time is over
            writer.close()
        assert await asyncio.to_thread(ask, home, server.url, "/status") == {"epoch": 3}

    with_server(home, use)


def test_a_renewed_certificate_is_served_and_a_broken_one_is_not(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.0)
    caplog.set_level("INFO")

    async def use(server: HttpServer, folder: Path) -> None:
        assert await asyncio.to_thread(shown_by, server) == "first.example.org"
        cert, _ = write_pair(folder, "second.example.org")
        assert await asyncio.to_thread(shown_by, server) == "second.example.org"
        assert await asyncio.to_thread(ask, home, server.url, "/status") == {"epoch": 3}
        cert.write_text("half of a cert")
        os.utime(cert, ns=(1, 1))
        assert await asyncio.to_thread(shown_by, server) == "second.example.org"

    with_server(home, use)
    said = [record.getMessage() for record in caplog.records if record.name == "tapestry.http"]
    assert said[0].startswith("certificate=renewed") and said[1].startswith("certificate=kept http_cert ")


def test_a_certificate_that_has_ended_is_said_and_the_commands_of_this_home_go_on(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(server: HttpServer, _: Path) -> None:
        assert await asyncio.to_thread(ask, home, server.url, "/status") == {"epoch": 3}

    with_server(home, use, days=-1)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said.startswith("certificate=has ended path=")


def test_a_renewal_on_a_full_disk_is_served_and_a_key_that_others_can_read_is_said(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = write_pair(tmp_path / "pair", "a.example.org")
    served = ServerTls(cert, key, home.http_cert)
    monkeypatch.setattr(tls, "LOOK_EVERY_S", 0.0)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tls, "atomic_write", full)
    write_pair(tmp_path / "pair", "b.example.org")
    key.chmod(0o604)
    before = served._context
    assert served.context() is not before
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 2 and "other users" in said[0] and "cannot be written" in said[1]


def test_a_key_that_is_given_to_the_nodes_user_by_its_group_is_as_it_should_be(
    home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = write_pair(tmp_path / "pair", "a.example.org")
    key.chmod(0o640)
    ServerTls(cert, key, home.http_cert)
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_the_key_of_a_file_that_holds_both_is_not_copied(home: Home, tmp_path: Path) -> None:
    cert, key = write_pair(tmp_path / "pair", "both.example.org")
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    ServerTls(both, both, home.http_cert)
    assert home.http_cert.read_bytes() == cert.read_bytes()


def test_a_key_of_another_certificate_is_refused_in_a_line(home: Home, tmp_path: Path) -> None:
    cert, _ = write_pair(tmp_path / "a", "a.example.org")
    _, key = write_pair(tmp_path / "b", "b.example.org")
    with pytest.raises(UserError, match=r"cert\.pem and .*key\.pem: key values mismatch"):
        ServerTls(cert, key, home.http_cert)
    with pytest.raises(UserError, match="No such file"):
        ServerTls(tmp_path / "none.pem", key, home.http_cert)


def test_tls_needs_both_files_and_paths_are_relative_to_the_home(home: Home) -> None:
    said = '[data]\npaths = ["stdlib"]\n'
    home.node_toml.write_text(f'http_cert = "c.pem"\nhttp_key = "k.pem"\n{said}')
    assert NodeConfig.resolve(home, {}, {}).http_tls == (home.path / "c.pem", home.path / "k.pem")
    home.node_toml.write_text(f'http_cert = "c.pem"\n{said}')
    with pytest.raises(UserError, match=r"node\.toml: http_cert is given without http_key"):
        NodeConfig.resolve(home, {}, {})
