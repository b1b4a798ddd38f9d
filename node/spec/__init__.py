"""What is agreed on by all members of a run, and what each configures for itself."""
