"""The wire format: ``unseen.proto``, documented field by field, and the stubs generated from it (``make proto``)."""
