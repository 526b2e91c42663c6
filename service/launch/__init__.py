"""The command's settings, and the processes made of them: started, watched, restarted, drained.

It knows nothing of what a request is.
"""
