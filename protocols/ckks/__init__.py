"""CKKS: the server computes on ciphertexts that the client alone can decrypt."""
