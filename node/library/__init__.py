"""A training loop of one's own as a member's trainer: the parts of node/api.py."""
