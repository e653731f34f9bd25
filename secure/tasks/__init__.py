"""Tasks that a model serves. A task loads a model, makes its inputs, and reads its answer.

task         the base of all tasks
closeness    how close answers are to the original model's
embed        texts to vectors
digits       images of digits to the digits
headed       the base of tasks whose models have a head
classify     texts and pairs to the names of their classes
tag          texts to the entities in them
answer       questions to a part of their context
rerank       queries and documents to scores
search       questions to the passages of an index
generate     texts to what a model writes after them
"""
