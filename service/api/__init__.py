"""The RPCs: handlers made from descriptors, the servicer, errors turned into statuses, documents.

It knows no rule of a request: it converts, hands over and presents.
"""
