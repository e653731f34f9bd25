"""Models as they are found, and the text around them.

tokens       text to token ids
calibration  public sentences that set ranges, and others to try a model out on
sentence_encoder    sentence encoders in sentence-transformers' format
digits       a small vision transformer in polynomial form
text         text models: directories, tokenizers, inputs, calibration
"""
