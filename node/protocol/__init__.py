"""The protocol as pure state machines: standard library only; no clock, no randomness, no I/O, no torch."""
