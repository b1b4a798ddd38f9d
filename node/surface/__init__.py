"""What people and tools see of a node: HTTP, status, metrics, logs."""
