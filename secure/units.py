"""Numbers with units, for people."""

from __future__ import annotations


def in_units(size: int) -> str:
    """Write a number of bytes with a unit in which it is not small: ``640 B``, ``7.2 kB``, ``199 kB``, ``31.9 MB``."""
    if size < 1000:
        return f"{size} B"
    if size < 1e6:
        return f"{size / 1e3:.{int(size < 1e5)}f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
