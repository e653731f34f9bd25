"""Models in polynomial form: nothing to compare, nothing to divide.

recipe       how a model is put into that form
operations   what ``torch.export`` keeps whole
forms        modules in the place of softmax, activations and norms
swap         those modules swapped into Hugging Face models
"""
