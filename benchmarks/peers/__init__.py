"""The same work on other systems, to be measured beside ours.

setup.sh         makes a peer's environment
works            the works: names, inputs, float64 results (numpy alone)
export_minilm    all-MiniLM-L6-v2's weights and a sentence as an .npz, in our environment
spu_bench        SecretFlow SPU, in its environment
crypten_bench    CrypTen, in its environment
crypten_import   makes CrypTen importable on current versions of torch
crypten_check    our traces on CrypTen's own operations, in an environment that has both

Run as ``python -m benchmarks.peers.NAME`` in the project's root: CrypTen's wheel installs a package ``benchmarks``
of its own, which the current directory goes before.
"""
