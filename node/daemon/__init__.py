"""The life of a node. Empty on purpose: the trainer starts before torch is imported."""
