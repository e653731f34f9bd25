"""Ask a server for embeddings that it never sees. First run `unseen dealer` and `unseen serve --length 32`.

python -m examples.embed
"""

import torch

import secure

TEXTS = ["How do I reset my password?", "I forgot my login.", "The treaty ended the war."]


def main(server: str = "127.0.0.1:50051", dealer: str = "127.0.0.1:50052") -> None:
    with secure.connect(secure.TwoParty(server=server, dealer=dealer)) as session:
        session.prepare()  # the work that needs no text yet: the first answer then comes faster
        question, *others = session.embed(TEXTS)
        report = session.reports[-1]
    for text, vector in zip(TEXTS[1:], others, strict=True):
        print(f"{float(torch.cosine_similarity(question, vector, dim=-1)):.3f}  {text}")
    print(f"{report.rounds} rounds, {report.online_seconds:.2f} s online, {report.offline_seconds:.2f} s offline")


if __name__ == "__main__":
    main()
