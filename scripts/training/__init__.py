"""What scripts/bench_training.py compares, and with what."""
