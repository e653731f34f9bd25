"""Loading models and tokenizers, and making their inputs and calibration inputs.

tokens              text to token ids
tokenizer_document  the tokenizers that clients run: checks, loading, digest
hollow              models whose parameters take no memory
checkpoints         the weights of a model directory, all of them or none
onnx_weights        weights of an ONNX graph, and the graph against the model of them
calibration         public sentences that set ranges, and others that test a model
pooling             one vector from the hidden states of a text's tokens
prompts             what clients put before their texts
sentence_directory  the modules that a directory of sentence-transformers lists
sentence_encoder    sentence encoders in sentence-transformers' format
served_tokenizer    the tokenizer that clients run, made from a directory's as transformers loads it
digits              a small vision transformer in polynomial form
text                text models: directories, tokenizers, inputs, calibration
decoder             decoders as they generate text, and their inputs
causal              models that write text: directories, chat templates, where texts end
draft               a small model that guesses how a text goes on
chat                chat templates: from messages to the text that a model continues
chat_process        the process that renders one of them, within bounds
detokenizer         from tokens to text as they come, and the strings that stop it
pairs               texts and pairs of texts, with the place of every token
heads               models with a head: classifiers, taggers, answerers, rerankers
images              images to a model's inputs, and image classifiers
passages            documents from files, and their passages
clusters            rows of an index in clusters of neighbours, as large as each other
index               an index of passages and their embeddings, as files
searcher            the model of a private search: scores, the best, and their records
settings            what clients must know of a model with a head
"""
