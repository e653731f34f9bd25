"""Measurements: each module is a command that prints a table and can write a results file."""
