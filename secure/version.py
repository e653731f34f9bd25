"""The version of the package, and of what its parties say to one another."""

__version__ = "0.2.0"

WIRE_VERSION = 2
