"""The trainer process: model, data, inner optimizer -> one contribution per epoch."""
