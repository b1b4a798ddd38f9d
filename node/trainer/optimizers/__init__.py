"""The inner optimizers: one file each, and a line in `registry` that names it."""
