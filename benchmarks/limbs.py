"""Time exact matrix products modulo 2^ring against torch's int64 product, on one thread by default.

Run from the repository: ``python -m benchmarks.limbs [--repeats N] [--threads N]``.  Prints medians; a ratio above 1
means that the limbs are faster than torch's int64 product, which depends on the processor: torch has a vectorized int64
kernel for AVX-512 only. The last column is that of ``protocols.madd52``, where the ring and the processor allow it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from protocols import madd52
from protocols.limbs import matmul, pack


@dataclass(frozen=True)
class Case:
    """A product of shapes (batch, m, n) and (batch, n, p); `b_bits` None: residues."""

    label: str
    batch: int
    m: int
    n: int
    p: int
    ring: int
    b_bits: int | None
    packed: bool
    a_bits: int | None = None


CASES = [
    *(
        Case("share x weight", 0, m, n, p, ring, bits, True)
        for ring, bits in ((40, 16), (48, 18), (64, 14), (64, 16), (64, 18))
        for m, n, p in ((128, 768, 3072), (128, 3072, 768), (128, 384, 384), (32, 384, 1536))
    ),
    *(
        Case("residue x residue", 0, m, n, p, ring, None, packed)
        for ring in (38, 45, 48, 64)
        for m, n, p in ((128, 768, 3072), (128, 3072, 768), (32, 384, 1536))
        for packed in (True, False)
    ),
    *(
        Case("heads", 12, m, n, p, ring, None, False)
        for ring in (45, 64)
        for m, n, p in ((128, 32, 128), (128, 128, 32))
    ),
    *(Case("one-hot", 0, 128, 30522, 384, 24, bits, packed) for bits in (None, 18) for packed in (True, False)),
]


def median(run: Callable[[], object], repeats: int) -> float:
    """Median duration of `run` in seconds, after one run to warm up."""
    run()
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def integers(shape: tuple[int, ...], bits: int | None, generator: torch.Generator) -> torch.Tensor:
    """Uniform signed integers of `bits` bits (None: all 64)."""
    values = torch.randint(-(1 << 63), (1 << 63) - 1, shape, generator=generator)
    return values if bits is None else values >> (64 - bits)


def main() -> None:
    """Print one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-int64", action="store_true", help="do not time or check against torch int64")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(1)
    print(
        f"{'case':18} {'batch x m x n x p':>24} ring weight packed {'ms':>8} {'GMAC/s':>7} {'int64':>7} "
        f"{'ratio':>6} {'madd52':>7}"
    )
    for case in CASES:
        batch = (case.batch,) if case.batch else ()
        a = integers((*batch, case.m, case.n), None, generator)
        b = integers((*batch, case.n, case.p), case.b_bits, generator)
        right = b
        prepared = (
            pack(b, case.b_bits or case.ring, signed=case.b_bits is not None, ring=case.ring) if case.packed else b
        )
        macs = max(1, case.batch) * case.m * case.n * case.p / 1e9
        seconds = median(
            lambda: matmul(a, prepared, case.ring, b_bits=None if case.packed else case.b_bits), arguments.repeats
        )
        reference = ""
        if not arguments.skip_int64:
            mask = -1 if case.ring == 64 else (1 << case.ring) - 1
            expected = (a @ right) & mask
            actual = matmul(a, prepared, case.ring, b_bits=None if case.packed else case.b_bits) & mask
            assert torch.equal(actual, expected), case
            plain = median(lambda: a @ right, 3)
            reference = f"{macs / plain:7.2f} {plain / seconds:6.1f}"
            if case.ring <= madd52.BITS and madd52.available():
                assert torch.equal(madd52.matmul(a, right) & mask, expected), case
                reference += f" {macs / median(lambda: madd52.matmul(a, right), 3):7.2f}"
        shape = f"{max(1, case.batch)} x {case.m} x {case.n} x {case.p}"
        weight = "all" if case.b_bits is None else case.b_bits
        print(
            f"{case.label:18} {shape:>24} {case.ring:4} {weight:>6} {case.packed!s:>6} "
            f"{seconds * 1e3:8.2f} {macs / seconds:7.2f} {reference}",
            flush=True,
        )


if __name__ == "__main__":
    main()
