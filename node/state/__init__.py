"""What lies on disk under a node's home: chain, update log, checkpoints, votes."""
