"""What can be wrong with a start at first sight: said before torch and hivemind are imported.

All of it is looked at again where it counts; this only spares whoever mistyped a flag the seconds until then.
The data were looked at by the command line.

Must not import torch, hivemind or transformers.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from tapestry.dht.addresses import parse_peer
from tapestry.dht.identity import Identity, IdentityError
from tapestry.dht.ports import port_fault
from tapestry.node.disk.store import Store, read_vote
from tapestry.node.errors import UserError, as_user_error
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.net.asked import own_spec, refuse_ourselves, spec_to_found
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import RunSpec
from tapestry.node.surface.listener import require_port
from tapestry.node.trainer.tokenizers.api import TokenizerError
from tapestry.node.trainer.tokenizers.base import bos_id_of


def check_early(config: NodeConfig) -> None:
    """With the home's lock held. Raises UserError; what the disk does not give is the node's to say."""
    require_port(config.http_host, config.http_port)
    for address in config.listen:
        if why := port_fault(address):
            hint = f"an earlier start was given {' '.join(config.kept)}: --listen changes it"
            raise UserError(why, hint=hint if config.kept else None)
    with contextlib.suppress(OSError):
        _check_home(config)


def _check_home(config: NodeConfig) -> None:
    """Raises UserError, OSError."""
    if config.home.identity_key.exists():
        with as_user_error(IdentityError):
            identity = Identity.load(config.home.identity_key)
        refuse_ourselves([parse_peer(text) for text in config.peers], identity.peer_id)
    read_vote(config.home)
    genesis = Store(config.home, ReaderCrypto()).read_genesis()
    if genesis is not None:
        own_spec(config, genesis)
    elif not config.peers:
        _check_bos(spec_to_found(config), config.home.base)


def _check_bos(spec: RunSpec, base: Path) -> None:
    """Raises UserError where the run would put a BOS that the base's tokenizer lacks."""
    if spec.data.add_bos:
        with as_user_error(TokenizerError):
            bos_id_of(base)
