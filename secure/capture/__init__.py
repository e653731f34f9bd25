"""From a torch module to a graph of typed operations, through ``torch.export``.

documents           JSON and tensors from outside, within bounds
tensor_files        files of tensors that are written one by one, and mapped
clear_operations    functions that one party evaluates in the clear
operation           operations as records, and the rules that translate torch's operations into them
graph               a model as a flat list of typed operations, and its float interpreter
builder             building a graph: nodes, visibilities, folding of public values
capture             translating a module through ``torch.export``
"""
