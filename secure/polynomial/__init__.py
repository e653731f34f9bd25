"""Models in polynomial form, which need neither comparisons nor divisions.

recipe       how a model is put into that form
operations   operations that ``torch.export`` keeps whole
forms        modules in the place of softmax, activations and norms
swap         those modules swapped into Hugging Face models
"""
