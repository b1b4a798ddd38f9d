"""The faults of which scripts/recovery.py measures the recovery, a module each."""
