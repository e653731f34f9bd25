"""Search a folder of documents in private: make an index, compile a search, ask it. Here all parties are one process.

python -m examples.search
"""

import tempfile
from pathlib import Path

import secure
from secure.models.index import build_index, write_index
from secure.models.passages import read_documents
from secure.models.text import load_text_model

DOCUMENTS = {
    "returns.md": "An item may be returned within thirty days. Keep the receipt, and send it back in its box.",
    "delivery.md": "Parcels leave our warehouse every morning. Delivery takes two days, abroad five.",
    "warranty.txt": "Machines that break within two years are repaired for free, or replaced by a new one.",
    "garden.txt": "Tomatoes want sun and water. Plant them in May, when there is no frost any more.",
}


def main(model: str = "all-MiniLM-L6-v2") -> None:
    with tempfile.TemporaryDirectory() as space:
        folder, index = Path(space) / "documents", Path(space) / "index"
        folder.mkdir()
        for name, text in DOCUMENTS.items():
            (folder / name).write_text(text)
        made, _ = build_index(model, load_text_model(model), read_documents(folder), length=64, overlap=8)
        write_index(made, index)  # as `unseen index` does
        compiled = secure.compile_text_model(model, 16, index=str(index), top=2, reveal="passages-scores")
    with secure.insecure_in_process(compiled) as session:  # protects nothing
        for found in session.search(["My washing machine is broken.", "When will it arrive?"]):
            for each in found:
                print(f"{each['score']:.3f}  {each['id']}: {each['text']}")


if __name__ == "__main__":
    main()
