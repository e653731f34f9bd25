"""What people ask a model for: how a task loads a model, makes its inputs, and reads its answer.

task         what a task is
embed        texts to vectors
digits       images of digits to the digits
"""
