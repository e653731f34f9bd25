"""Training a model into polynomial form.

checkpoint   the state of a training run, in one file
trainer      the training loop in stages, which a killed run resumes
lesson       what a student learns from
sentences    the lesson of a sentence encoder
language     the lesson of a language model, and perplexities
distil       a model of either kind, trained and written to a directory
fidelity     how close a polynomial model is to its original, and its Program to its floating point
"""
