"""Sessions in the shapes of libraries that people know. Each takes what ``secure.connect`` takes.

opening                the session of a shape
sentence_transformer   ``sentence_transformers.SentenceTransformer``
pipelines              ``transformers.pipeline``
langchain              embeddings and a chat model of LangChain
llama_index            embeddings and a language model of LlamaIndex
"""
