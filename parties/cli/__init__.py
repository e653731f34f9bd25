"""The command ``unseen``, one file a verb.

options      options that several commands take
profile_ckks what a model costs on ciphertexts
profile      ``unseen profile``
compare      ``unseen compare``
train        ``unseen train``
accuracy     ``unseen accuracy``
party        ``unseen share-model`` and ``unseen party``
demo         ``unseen demo``
demo_digits  ``unseen demo --digits``
main         the commands put together
"""
