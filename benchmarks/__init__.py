"""Measurements: each module is a command that prints a table and can write a results file."""

import os

os.environ["UNSEEN_SAME_OWNER"] = "yes"  # one user runs all roles here, to measure them
os.environ["UNSEEN_CONFIG"] = os.devnull  # no settings of the user's own services
