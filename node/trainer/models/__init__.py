"""The networks that a run can train, and their flat vectors."""
