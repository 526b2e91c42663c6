"""Which tokens may follow: automata of grammars, and the masks that they put over logits.

It knows no tools and no callers, and trusts that a grammar's source was tried out before.
"""
