"""Everything that is compiled when it is first used, compiled before a query waits for it.

``NUMBA_CACHE_DIR=DIRECTORY python -m protocols.warm`` keeps it in a directory (``protocols.kept_kernels``).
"""

from protocols import kernels, matmul, wire
from protocols.two_party import bitproducts, digits, intervals


def warm_up() -> None:
    """Compile the kernels of one element and of matrices, or load them from where they are kept."""
    for each in (kernels, wire, matmul, bitproducts, digits, intervals):
        each.warm_up()


def warm_up_all() -> None:
    """The same for all kernels, those of look-ups by three parties too, which take a client's key to be compiled."""
    from protocols.prg import Key, derive_key, fresh_seed
    from protocols.three_party import dpf
    from protocols.three_party.sketch import Sketch

    warm_up()
    stream = Key(derive_key(fresh_seed(), "warm")).stream(0)
    for points, columns, shares in dpf.slices(dpf.generate([0], dpf.LEAF + 1)[0], 0):
        Sketch(1, 0, stream).add(points, columns.start, shares)


if __name__ == "__main__":
    warm_up_all()
