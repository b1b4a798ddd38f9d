"""Attacks on real nodes by whoever is no member; registry.py has their names."""
