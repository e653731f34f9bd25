"""Tasks that a model serves. A task loads a model, makes its inputs, and reads its answer.

task         the base of all tasks
embed        texts to vectors
digits       images of digits to the digits
"""
