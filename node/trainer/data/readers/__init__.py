"""Formats of data, one file each; registry.py names them all."""
