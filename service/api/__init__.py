"""The RPCs: handlers made from descriptors, the servicer, the statuses of errors, API documents.

A handler converts its request, passes it to the other folders and presents the result. The only
rule of a request that is applied here is the size of schemas, before they are parsed (`rpc.py`).
"""
