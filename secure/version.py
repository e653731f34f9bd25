"""The version of the package and of what it says on the wire."""

__version__ = "0.2.0"
