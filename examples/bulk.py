"""Embed texts from standard input as they come, however many. First run `unseen dealer` and `unseen serve --batch 8`.

python -m examples.bulk < texts.txt > embeddings.jsonl
"""

import json
import sys
from collections.abc import Iterable

import secure
from secure.tasks.embed import Embed


def main(texts: Iterable[str] = sys.stdin, server: str = "127.0.0.1:50051", dealer: str = "127.0.0.1:50052") -> None:
    with secure.connect(secure.TwoParty(server=server, dealer=dealer)) as session:
        answers = session.stream(Embed(long="truncate"), (text.strip() for text in texts))
        for number, answer in enumerate(answers, 1):
            if isinstance(answer, secure.Error):  # of this text alone; the others go on
                print(f"text {number}: {answer}", file=sys.stderr)
            else:
                print(json.dumps(answer.tolist()), flush=True)


if __name__ == "__main__":
    main()
