"""Operations, a family a module.

shapes       shapes, pieces and selections
polynomial_forms    what models in polynomial form are made of
normalizations      norms and inverse roots
"""
