"""A hundred sentences for measuring, apart from those that calibrate: made from templates, the same every time."""

from __future__ import annotations

_SUBJECTS = (
    "A nurse",
    "The old bridge",
    "My neighbour's dog",
    "Nobody in the office",
    "The new tax law",
    "Her grandfather",
    "This laptop",
    "The football team",
    "An unexpected storm",
    "The museum in Utrecht",
)
_VERBS = (
    "closed before anyone could object",
    "was praised in three newspapers",
    "needs to be replaced by Friday",
    "kept everyone awake until 4 a.m.",
    "cost 1,250 euros more than planned",
    "made the children laugh",
    "is the reason why I moved to Lisbon",
    "failed, then worked, then failed again",
    "has been discussed for years without any result",
    "reminded me of a song that I had forgotten",
)
_TAILS = (
    "",
    ", which surprised the experts",
    " (according to the report)",
    "; we will see what happens next",
    "?",
    "!!!",
    ", and I'm not even sorry",
    " - at least that is what the minutes say",
    " because of the weather",
)


def sentences(count: int = 100) -> list[str]:
    """``count`` (at most 100) sentences of one to about 60 words, deterministic."""
    out = []
    for i in range(count):
        text = f"{_SUBJECTS[i % 10]} {_VERBS[(i // 10 + 3 * i) % 10]}{_TAILS[(7 * i + i // 9) % 9]}"
        if i % 5 == 4:  # some long ones
            more = (f"{_SUBJECTS[(i + k) % 10]} {_VERBS[(3 * i + k) % 10]}." for k in range(1, 1 + i // 20))
            text += ". " + " ".join(more)
        if i % 25 == 0:
            text = text.split()[-1]  # and some of one word
        out.append(text)
    return out
