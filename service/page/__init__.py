"""The page for browsers at `/`: one document with its style and its script, without the server.

It knows the REST paths that it calls, and nothing of how it is served.
"""
