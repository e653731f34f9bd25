"""Texts of a file, and their embeddings in another, with memory that does not grow with either.

texts        the texts of a file: lines, a field of JSON lines, a column of CSV
rows         rows of embeddings as bytes: JSON lines, npy, CSV
unfinished   rows that a run appends, so that whoever kills it loses no whole row
connection   the way a client connects, as a value
embedding    a session's answers to the texts of a run, as rows
"""
