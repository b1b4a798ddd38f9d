"""Text -> ids. One file per tokenizer; registry.py opens them by name."""
