"""Ask a server for embeddings as with sentence-transformers. First run `unseen dealer` and `unseen serve --length 32`.

python -m examples.shapes
"""

import asyncio

import secure

QUESTION = "How do I reset my password?"
DOCUMENTS = ["I forgot my login.", "The treaty ended the war."]


def main(server: str = "127.0.0.1:50051", dealer: str = "127.0.0.1:50052") -> None:
    with secure.SentenceTransformer(secure.TwoParty(server=server, dealer=dealer)) as model:
        documents = model.encode_document(DOCUMENTS, normalize_embeddings=True)
        question = asyncio.run(model.aencode(QUESTION))  # in a notebook: await model.aencode(QUESTION)
        closeness = model.similarity(question, documents)[0].tolist()
    for text, cosine in zip(DOCUMENTS, closeness, strict=True):
        print(f"{cosine:.3f}  {text}")


if __name__ == "__main__":
    main()
