"""The claims of keywords that speak of one type only."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from ...protocol.errors import GrammarError
from ..schema.applicators import with_prefix_items
from ..schema.keywords import Schema, items, strings
from ..schema.strings import FORMATS, with_known_strings
from .arrays import ArrayForm, Count
from .claims import Claim, Forms, claim, listed, named, one_sided, size
from .demands import ANYTHING, NOTHING, Schemas
from .numbers import NumberForm
from .objects import Names, ObjectForm, Witness
from .texts import TextForm

_EVERY_NAME = Names(are_others=True)


def number_claims(schema: Schema, _schemas: Schemas, _strict: bool) -> Iterator[Claim]:
    """The claims on numbers."""
    for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"):
        if key in schema and type(schema[key]) not in (int, float):
            raise GrammarError(f'"{key}" must be a number')
    for key, is_open in (("minimum", False), ("exclusiveMinimum", True)):
        if key in schema:
            above = NumberForm(low=schema[key], is_low_open=is_open)
            yield claim(above, [NumberForm(high=schema[key], is_high_open=not is_open)])
    for key, is_open in (("maximum", False), ("exclusiveMaximum", True)):
        if key in schema:
            below = NumberForm(high=schema[key], is_high_open=is_open)
            yield claim(below, [NumberForm(low=schema[key], is_low_open=not is_open)])
    if "multipleOf" in schema:
        factor = Fraction(repr(schema["multipleOf"]))
        if factor <= 0:
            raise GrammarError('"multipleOf" must be above 0')
        yield one_sided(NumberForm(factor=factor), "multipleOf")


def text_claims(schema: Schema, _schemas: Schemas, strict: bool) -> Iterator[Claim]:
    """The claims on strings; with `strict` unknown formats are refused."""
    least, most = size(schema, "minLength"), size(schema, "maxLength")
    if least:
        yield claim(TextForm(min_length=least), [TextForm(max_length=least - 1)])
    if most is not None:
        yield claim(TextForm(max_length=most), [TextForm(min_length=most + 1)])
    if isinstance(pattern := schema.get("pattern"), str):
        # For itself a pattern may be read more strictly, its opposite may not.
        read = with_known_strings({"pattern": pattern}, "", strict_formats=strict)
        patterns = [read["pattern"], *(part["pattern"] for part in items(read.get("allOf")))]
        yield claim(TextForm(patterns=tuple(patterns)), [TextForm(other_than=(pattern,))])
    if isinstance(name := schema.get("format"), str):
        with_known_strings({"format": name}, "the schema", strict_formats=strict)
        if name in FORMATS:
            yield one_sided(TextForm(formats=(name,)), "format")


def array_claims(schema: Schema, schemas: Schemas, _strict: bool) -> Iterator[Claim]:
    """The claims on arrays."""
    if "prefixItems" in schema or "items" in schema:
        yield _items_claim(schema, schemas)
    least, most = size(schema, "minItems"), size(schema, "maxItems")
    if least:
        yield claim(ArrayForm(least=least), [ArrayForm(most=least - 1)])
    if most is not None:
        yield claim(ArrayForm(most=most), [ArrayForm(least=most + 1)])
    if "contains" in schema:
        yield _contains_claim(schema, schemas)
    if schema.get("uniqueItems") is True:
        yield one_sided(ArrayForm(is_unique=True), "uniqueItems")


def _items_claim(schema: Schema, schemas: Schemas) -> Claim:
    schema = with_prefix_items(schema)
    prefix = listed(schema, "prefixItems")
    rest = schema.get("items", True)
    form = ArrayForm(
        tuple(map(schemas.demand, prefix)),
        schemas.demand(rest),
        num_seen=len(prefix),
        are_all_seen="items" in schema,
    )
    fails: Forms = []
    for index, item in enumerate(prefix):
        wrong = schemas.demand(item, holds=False)
        fails.append(ArrayForm((*[ANYTHING] * index, wrong), least=index + 1))
    if rest is not True:
        wrong = schemas.demand(rest, holds=False)
        count = Count(len(prefix), wrong, schemas.demand(rest), 1)
        fails.append(ArrayForm(counts=(count,)))
    return claim(form, fails)


def _contains_claim(schema: Schema, schemas: Schemas) -> Claim:
    least, most = size(schema, "minContains", 1) or 0, size(schema, "maxContains")
    fits = schemas.demand(schema["contains"])
    fails = schemas.demand(schema["contains"], holds=False)

    def form(low: int, high: int | None) -> ArrayForm:
        if high == 0:
            return ArrayForm(rest=fails)
        counts = (Count(0, fits, fails, low, high),) if low or high is not None else ()
        return ArrayForm(counts=counts, seen=(fits,))

    others = [form(0, least - 1)] if least else []
    if most is not None:
        others.append(form(most + 1, None))
    is_possible = most is None or most >= least
    return Claim(lambda: [form(least, most)] if is_possible else [], lambda: others)


def object_claims(schema: Schema, schemas: Schemas, _strict: bool) -> Iterator[Claim]:
    """The claims on objects."""
    if not schema.keys().isdisjoint(("properties", "patternProperties", "additionalProperties")):
        yield _properties_claim(schema, schemas)
    required = strings(schema.get("required"))
    if required:
        absent = [absent_form(name) for name in required]
        yield claim(ObjectForm(required=tuple(required)), absent)
    least, most = size(schema, "minProperties"), size(schema, "maxProperties")
    if least:
        yield claim(ObjectForm(least=least), [ObjectForm(most=least - 1)])
    if most is not None:
        yield claim(ObjectForm(most=most), [ObjectForm(least=most + 1)])
    if "propertyNames" in schema:
        names = schemas.demand(schema["propertyNames"])
        wrong = schemas.demand(schema["propertyNames"], holds=False)
        witness = Witness(_EVERY_NAME, wrong, ANYTHING)
        yield claim(ObjectForm(names=names), [ObjectForm(witnesses=(witness,))])


def absent_form(name: str) -> ObjectForm:
    """Objects without a property."""
    return ObjectForm(rules=((Names(frozenset([name])), NOTHING),))


def _properties_claim(schema: Schema, schemas: Schemas) -> Claim:
    properties, patterns = named(schema, "properties"), named(schema, "patternProperties")
    spoken_of = Names(frozenset(properties), frozenset(patterns))
    groups: list[tuple[Names, Any]] = [(Names(frozenset([n])), properties[n]) for n in properties]
    groups += [(Names(patterns=frozenset([p])), patterns[p]) for p in patterns]
    if "additionalProperties" in schema:
        others = Names(spoken_of.listed, spoken_of.patterns, are_others=True)
        groups.append((others, schema["additionalProperties"]))
    rules = tuple((names, schemas.demand(value)) for names, value in groups)
    form = ObjectForm(rules, seen=spoken_of, are_all_seen="additionalProperties" in schema)
    return claim(form, [_wrong(names, value, schemas) for names, value in groups])


def _wrong(names: Names, value: Any, schemas: Schemas) -> ObjectForm:
    """Objects with a property of such a name that does not fit."""
    demands = schemas.demand(value, holds=False)
    if names.listed and not names.are_others:
        return ObjectForm(((names, demands),), required=tuple(names.listed))
    return ObjectForm(witnesses=(Witness(names, ANYTHING, demands),))
