"""The key of all dealers in the tests that have no other; the tests' user has it in their state directory."""

from parties.two_party.sealing import SealingKey

KEY = SealingKey.generate()
