"""Everything that is compiled when it is first used, compiled before a query waits for it."""

from protocols import kernels, matmul


def warm_up() -> None:
    """Compile the kernels of one element and of matrices, or load them from the cache beside their files."""
    kernels.warm_up()
    matmul.warm_up()
