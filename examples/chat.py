"""Chat with a model that sees none of it. First run `unseen dealer` and `unseen serve ./smollm2 --length 256 --capacity
512`, of a directory with a chat template.

python -m examples.chat
"""

import sys
from collections.abc import Iterable

import secure

LONGEST = 200  # tokens of an answer


def main(lines: Iterable[str] = sys.stdin, server: str = "127.0.0.1:50051", dealer: str = "127.0.0.1:50052") -> None:
    messages = list[dict[str, str]]()
    with secure.connect(secure.TwoParty(server=server, dealer=dealer)) as session:
        for line in lines:
            messages.append({"role": "user", "content": line.strip()})
            while True:
                try:
                    answer = session.generate(messages, LONGEST)
                    for piece in answer:
                        print(piece, end="", flush=True)
                    break
                except secure.InputTooLong:  # forget the first question and its answer
                    if len(messages) == 1:
                        raise
                    del messages[:2]
            print()
            messages.append({"role": "assistant", "content": answer.text})


if __name__ == "__main__":
    main()
