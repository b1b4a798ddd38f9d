"""The Tapestry node: protocol, links, averaging, state, trainer, and the operator's surface."""
