"""Training a model into polynomial form.

checkpoint   the state of a training run, in one file
trainer      the training loop in stages, which a killed run resumes
distil       a sentence encoder's data, loss and report
fidelity     how close a polynomial model is to its original, and its Program to its floating point
"""
