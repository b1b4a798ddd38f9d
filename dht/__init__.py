"""Finding each other: identity, addresses, signed presence, and the libp2p swarm."""
