"""The version of the package, and the version of the messages between its parties."""

__version__ = "0.3.0"

WIRE_VERSION = 4
