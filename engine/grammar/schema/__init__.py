"""How a caller's JSON Schema is read before a library compiles it: the same for every library.

    schema --read_schema--> an equal or stricter one, in fewer words

What comes out has no annotations, no identities and only references to its own `$defs`. It knows no
library and no tokenizer.
"""

from .integers import exact_integers
from .keywords import UnsaidError
from .reading import read_schema

__all__ = ["UnsaidError", "exact_integers", "read_schema"]
