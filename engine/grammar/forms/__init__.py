"""Schemas whose keywords no library has, as grammars: `not`, `contains`, `uniqueItems` and others.

    demands on a value --expansion--> its forms, each of one type --writer--> rules of a grammar

A form says all that holds of a value and has no choice and no negation left in it. Only schemas
that `engine/grammar/schema` cannot say in a library's keywords come here, and those whose numbers
these would leave without an end.
"""

from .source import lark_source

__all__ = ["lark_source"]
