"""The price of a token where one query, a pass, checks several that a draft guesses.

A pass over k tokens, the last one and k - 1 guesses, gives one token more than agree. If each guess agrees with the
probability a, whatever the others do, these are 1 + a + ... + a^(k - 1) tokens in the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from secure.mpc.program import Program

AGREEMENTS = (0.0, 0.5, 0.8, 1.0)
"""The shares of guesses that agree for which prices are said."""


def length_of(program: Program) -> int:
    """Return how many tokens a Program checks in one pass; 0 if it checks no drafts."""
    return program.kept_rows if program.rows and program.kept_rows > 1 else 0


def asked(program: Program) -> str:
    """Name what one query of a Program is, of a model that writes text or another."""
    if not program.keeps:
        return "a query"
    if not program.rows:
        return f"a prompt of {program.kept_rows} tokens"
    return f"a pass over {length} tokens" if (length := length_of(program)) else "a token"


def tokens_of(length: int, agreement: float) -> float:
    """Return the tokens that a pass over ``length`` tokens gives in the mean, if so large a part of guesses agrees."""
    return float(sum(agreement**at for at in range(length)))


def a_token(length: int, price: float) -> dict[float, float]:
    """Return the price of a token for each of AGREEMENTS. price: of a pass over ``length`` tokens."""
    return {agreement: price / tokens_of(length, agreement) for agreement in AGREEMENTS}


def in_words(length: int, rounds: int, size: float, seconds: Mapping[str, float]) -> Iterator[str]:
    """Say in lines what a token takes. rounds, size, seconds: of a pass; bytes, and seconds by what they are of."""
    shares = ", ".join(f"{agreement:.0%}" for agreement in AGREEMENTS)
    yield (
        f"a pass gives 1 to {length} tokens; if {shares} of the guesses agree, a token takes "
        f"{_each(a_token(length, rounds), '.0f')} rounds and {_each(a_token(length, size / 1e6), '.3g')} MB online"
    )
    for name, found in seconds.items():
        yield f"{name}, for the same shares: {_each(a_token(length, found), '.3g')} s a token"


def _each(values: Mapping[float, float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values.values())
