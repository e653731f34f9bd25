"""Training a model into polynomial form.

checkpoint   a training run, in one file
trainer      stages that a killed run resumes
distil       a sentence encoder's data, loss and report
fidelity     how close a polynomial model is to its original, and its Program to itself
"""
