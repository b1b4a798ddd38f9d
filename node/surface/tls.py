"""The endpoint's TLS: a certificate and key that the operator gives, and what the node's own commands trust.

A certificate is renewed every few weeks while a node runs for months: before a handshake the two files are
looked at, at most once a minute, and read again when they have changed. What is served is copied to
HOME/http.cert, and the commands of this home trust that and nothing else, also after its last day: they ask
an address of this machine, which stands in no certificate. That it ends soon is said in the log once a day.

Imports ssl only when a file is named: the command line does not wait for it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import UserError

if TYPE_CHECKING:
    import ssl

LOOK_EVERY_S = 60.0  # Guess: a renewal comes weeks before the old certificate ends
ENDS_SOON_DAYS = 7  # Guess: whatever renews certificates has failed for weeks by then
SAY_EVERY_S = 86400.0
CERT_BYTES_MAX = 1 << 20
NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which ssl.VerifyFlags does not name

_log = logging.getLogger("tapestry.http")


class ServerTls:
    """The two files, read at the start and again when they have changed."""

    def __init__(self, cert: Path, key: Path, shown: Path) -> None:
        """Raises UserError if the two are not a certificate and its key; `shown` gets the certificate."""
        self._cert, self._key, self._shown = cert, key, shown
        self._marks = self._looked()
        self._looked_at_s = time.monotonic()
        self._ends_at, self._said_at_s = 0.0, -SAY_EVERY_S
        self._context = self._read()
        self._warn()

    def context(self) -> ssl.SSLContext:
        """For the next handshake. What cannot be read leaves the one before in force, and says so."""
        if time.monotonic() - self._looked_at_s >= LOOK_EVERY_S:
            self._looked_at_s = time.monotonic()
            marks = self._looked()
            if marks != self._marks:
                try:
                    self._context, self._marks = self._read(), marks
                except UserError as error:
                    _log.warning("certificate=kept %s; the one of before is served until it is mended", error)
                else:
                    _log.info("certificate=renewed path=%s", self._cert)
            self._warn()
        return self._context

    def _warn(self) -> None:
        """Of a certificate that ends soon, or has ended: browsers and scrapers refuse it then."""
        left_days = (self._ends_at - time.time()) / 86400
        if left_days < ENDS_SOON_DAYS and time.monotonic() - self._said_at_s >= SAY_EVERY_S:
            self._said_at_s = time.monotonic()
            when = f"ends in {left_days:.0f} days" if left_days > 0 else "has ended"
            _log.warning("certificate=%s path=%s; renew it: it is read again by itself", when, self._cert)

    def _looked(self) -> tuple[int, ...]:
        """What changes when somebody writes one of the files."""
        try:
            return (os.stat(self._cert).st_mtime_ns, os.stat(self._key).st_mtime_ns)
        except OSError:
            return ()

    def _read(self) -> ssl.SSLContext:
        import ssl

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
            with self._cert.open("rb") as file:
                shown = _certificates(file.read(CERT_BYTES_MAX))
            if os.stat(self._key).st_mode & 0o007:  # by a group is how its user gets it
                _log.warning("http_key=%s can be read by other users of this machine; chmod o= it", self._key)
        except ssl.SSLError as error:
            why = (error.reason or str(error)).lower().replace("_", " ")
            raise UserError(
                f"http_cert {self._cert} and http_key {self._key}: {why}",
                hint="both in PEM; the key of this certificate, without a password",
            ) from error
        except OSError as error:
            path = error.filename or f"{self._cert} or {self._key}"
            raise UserError(
                f"http_cert, http_key: {path}: {error.strerror}",
                hint="files that the user of the node can read",
            ) from error
        self._ends_at = _end_of(shown, self._cert)
        try:
            atomic_write(self._shown, shown)
        except OSError as error:  # the disk is full: what others are served matters more
            _log.warning(
                "path=%s cannot be written: %s; make room or mend the disk: commands of this home may fail",
                self._shown,
                error,
            )
        return context


def client_context(shown: Path) -> ssl.SSLContext:
    """What a command of this home asks its own node with. Raises OSError, of which ssl's errors are some."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # 127.0.0.1 stands in no certificate
    # The node's own certificate is what we trust, whether its time is over or not.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(NO_CHECK_TIME)
    context.load_verify_locations(shown)
    return context


def _certificates(pem: bytes) -> bytes:
    """Those of a file, which may hold the key as well."""
    return b"".join(
        re.findall(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\r?\n?", pem, re.DOTALL)
    )


def _end_of(pem: bytes, path: Path) -> float:
    """Unix time at which the first certificate ends. Raises UserError."""
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(pem)[0].not_valid_after_utc.timestamp()
    except ValueError as error:
        raise UserError(f"http_cert {path}: {error}", hint="a certificate in PEM") from error


def _no_password() -> str:
    """A key with a password: nobody is there to type it."""
    return ""
