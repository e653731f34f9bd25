"""Stubs that ``make proto`` generates from ``proto/unseen.proto``, the wire format, documented field by field.

They are not beside that file, as a package ``proto`` of ours would take the name of proto-plus, which many clients of
Google's services use.
"""
