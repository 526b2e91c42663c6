"""Work that may take long: threads that give way to the event loop, processes that may be killed.

Also who has whose turn, how many bytes may be worked on, and what the heap keeps afterwards. What
the work is, is not known here.
"""
