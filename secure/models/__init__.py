"""Loading models and tokenizers, and making their inputs and calibration inputs.

tokens              text to token ids
tokenizer_document  the tokenizers that clients run: checks, loading, digest
calibration         public sentences that set ranges, and others that test a model
sentence_encoder    sentence encoders in sentence-transformers' format
digits              a small vision transformer in polynomial form
text                text models: directories, tokenizers, inputs, calibration
"""
