"""Where a state comes from, and what leaves the node as a model."""
