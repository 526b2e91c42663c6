"""The forms of values that fit some schemas and do not fit others, type by type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..schema.choices import are_apart
from ..schema.keywords import IN_PLACE, Schema, Unlisted, items, strings, types_of
from .arrays import ArrayForm
from .claims import Claim, Forms, ValuesForm, claim, kind_of, listed, named
from .demands import ANYTHING, NOTHING, Demands, Schemas
from .keyword_claims import absent_form, array_claims, number_claims, object_claims, text_claims
from .limits import MAX_FORMS, MAX_STEPS, too_many, unsayable
from .numbers import NumberForm
from .objects import Names, ObjectForm
from .texts import TextForm

_ANY: dict[str, Any] = {
    "null": ValuesForm(frozenset([None])),
    "boolean": ValuesForm(frozenset([False, True])),
    "number": NumberForm(),
    "string": TextForm(),
    "array": ArrayForm(),
    "object": ObjectForm(),
}
_CLAIMS: dict[str, Callable[[Schema, Schemas, bool], Iterator[Claim]]] = {
    "number": number_claims,
    "string": text_claims,
    "array": array_claims,
    "object": object_claims,
}
_UNEVALUATED = {"array": "unevaluatedItems", "object": "unevaluatedProperties"}
_UNKNOWN = ("$dynamicRef", "$recursiveRef")
_OPENING = (
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "propertyNames",
)


class Expansion:
    """Expands demands into forms.

    Args:
        schemas: the schemas of the document.
        strict_formats: whether unknown formats are refused.
        are_closed: whether objects that list properties have no others.
    """

    def __init__(self, schemas: Schemas, *, strict_formats: bool, are_closed: bool) -> None:
        self.schemas = schemas
        self._are_closed = are_closed
        self._strict = strict_formats
        self._known: dict[tuple[str, bool, str, bool], Forms] = {}
        self._open: set[tuple[str, bool, str, bool]] = set()
        self._num_steps = 0

    def forms(self, demands: Demands, kind: str) -> Forms:
        """The forms of the values of a type.

        Raises:
            GrammarError: a keyword cannot be said, or there are too many forms.
        """
        forms: Forms = [_ANY[kind]]
        for text, holds in sorted(demands):
            forms = self._met(forms, self._of(self.schemas.of(text), text, holds, kind, False))
        is_closing = kind == "object" and self._are_closed
        closing = self._closing(demands) if is_closing else None
        return forms if closing is None else self._met(forms, [closing])

    def _met(self, some: Forms, others: Forms) -> Forms:
        """The forms of values that are of a form of both."""
        self._num_steps += len(some) * len(others)
        if self._num_steps > MAX_STEPS:
            raise too_many("combinations of its choices", MAX_STEPS)
        met = [form.met(other) for form in some for other in others]
        return _distinct([form for form in met if form is not None])

    def _fits(self, schema: Any, kind: str, watched: bool = False) -> Forms:
        return self._of(schema, "", True, kind, watched)

    def _fails(self, schema: Any, kind: str) -> Forms:
        return self._of(schema, "", False, kind, False)

    def _of(self, schema: Any, text: str, holds: bool, kind: str, watched: bool) -> Forms:
        """The forms of values that fit a schema, or do not; `watched` says which are evaluated."""
        if not isinstance(schema, dict):
            return [_ANY[kind]] if bool(schema) == holds else []
        ((text, _),) = self.schemas.demand(schema) or [("true", True)]
        key = (text, holds, kind, watched)
        if key in self._open:
            raise unsayable('a "$ref" that leads to itself')
        if key not in self._known:
            self._open.add(key)
            claims = self._claims(schema, kind, watched)
            if holds:
                self._known[key] = self._all(claims, schema, kind)
            else:
                failing = [_unseen(form) for some in claims for form in some.fails()]
                self._known[key] = _distinct(failing)
            self._open.discard(key)
        return self._known[key]

    def _all(self, claims: Iterator[Claim], schema: Schema, kind: str) -> Forms:
        forms: Forms = [_ANY[kind]]
        for some in claims:
            forms = self._met(forms, some.holds())
        if (key := _UNEVALUATED.get(kind)) is None or key not in schema:
            return forms
        rest = [self._unevaluated(form, schema[key]) for form in forms]
        met = [form.met(other) for form, other in zip(forms, rest, strict=True)]
        return [form for form in met if form is not None]

    def _unevaluated(self, form: Any, schema: Any) -> Any:
        """What holds of items or properties of which a form does not speak."""
        if form.are_all_seen:
            return type(form)()
        if isinstance(form, ObjectForm):
            others = Names(form.seen.listed, form.seen.patterns, are_others=True)
            return ObjectForm(((others, self.schemas.demand(schema)),), are_all_seen=True)
        choices = [self.schemas.of(text) for some in form.seen for text, _ in some]
        is_any = any(some == ANYTHING for some in form.seen)
        rest = True if is_any else {"anyOf": [schema, *choices]} if choices else schema
        prefix = (ANYTHING,) * form.num_seen
        return ArrayForm(prefix, self.schemas.demand(rest), are_all_seen=True)

    def _claims(self, schema: Schema, kind: str, watched: bool) -> Iterator[Claim]:
        for key in _UNKNOWN:
            if key in schema:
                raise unsayable(f'"{key}"')
        if types := types_of(schema):
            yield _type_claim(types, kind)
        if "const" in schema or "enum" in schema:
            yield from self._value_claims(schema, kind)
        unevaluated = _UNEVALUATED.get(kind)
        is_watched = watched or unevaluated in schema
        parts = [self._applied_claims(schema, kind, is_watched)]
        if kind == "object":
            parts.append(self._dependent_claims(schema, is_watched))
        if kind in _CLAIMS:
            own = _CLAIMS[kind](schema, self.schemas, self._strict)
            parts.insert(0 if _lists_first(schema) else len(parts), own)
        for part in parts:
            yield from part
        if unevaluated in schema:
            says_nothing = schema[unevaluated] in (True, {})
            refusal = _refusal(f'the opposite of "{unevaluated}"')
            yield Claim(lambda: [_ANY[kind]], list if says_nothing else refusal)

    def _applied_claims(self, schema: Schema, kind: str, watched: bool) -> Iterator[Claim]:
        """The claims of schemas that speak of the same value."""
        if "$ref" in schema:
            yield self._claim(self.schemas.followed(schema["$ref"]), kind, watched)
        for part in listed(schema, "allOf"):
            yield self._claim(part, kind, watched)
        if "anyOf" in schema:
            yield self._any_claim(listed(schema, "anyOf"), kind, watched)
        if "oneOf" in schema:
            yield self._one_claim(listed(schema, "oneOf"), kind, watched)
        if "not" in schema:
            given = schema["not"]
            yield Claim(lambda: self._fails(given, kind), lambda: self._fits(given, kind))
        if "if" in schema:
            yield self._condition_claim(schema, kind, watched)

    def _claim(self, schema: Any, kind: str, watched: bool) -> Claim:
        return Claim(lambda: self._fits(schema, kind, watched), lambda: self._fails(schema, kind))

    def _any_claim(self, schemas: list[Any], kind: str, watched: bool) -> Claim:
        def holds() -> Forms:
            fitting = [self._fits(schema, kind, watched) for schema in schemas]
            if not watched:
                return _distinct([form for forms in fitting for form in forms])
            some: Forms = []  # of each selection: which of them fit decides what is evaluated
            for forms in fitting:
                some = _distinct([*some, *forms, *self._met(some, forms)])
            return some

        return Claim(holds, lambda: self._none(schemas, kind))

    def _none(self, schemas: list[Any], kind: str) -> Forms:
        """The forms of values that fit none of some schemas."""
        forms: Forms = [_ANY[kind]]
        for schema in schemas:
            forms = self._met(forms, self._fails(schema, kind))
        return forms

    def _one_claim(self, schemas: list[Any], kind: str, watched: bool) -> Claim:
        def exactly(index: int) -> Forms:
            others = [*schemas[:index], *schemas[index + 1 :]]
            fitting = self._fits(schemas[index], kind, watched)
            return self._met(fitting, self._none(others, kind)) if fitting else []

        def holds() -> Forms:
            if are_apart(schemas, self.schemas.found):
                fitting = [self._fits(schema, kind, watched) for schema in schemas]
            else:
                fitting = [exactly(index) for index in range(len(schemas))]
            return _distinct([form for forms in fitting for form in forms])

        def fails() -> Forms:
            forms = self._none(schemas, kind)
            for index, schema in enumerate(schemas):
                for other in schemas[:index]:
                    forms = forms + self._met(self._fits(schema, kind), self._fits(other, kind))
            return _distinct(forms)

        return Claim(holds, fails)

    def _condition_claim(self, schema: Schema, kind: str, watched: bool) -> Claim:
        condition, then, other = (schema.get(key, True) for key in ("if", "then", "else"))

        def holds() -> Forms:
            if not watched and then is True and other is True:
                return [_ANY[kind]]
            fits = self._met(self._fits(condition, kind, watched), self._fits(then, kind, watched))
            if other is True and then is True:
                return _distinct([*fits, _ANY[kind]])
            fails = self._met(self._fails(condition, kind), self._fits(other, kind, watched))
            return _distinct([*fits, *fails])

        def fails() -> Forms:
            first = self._met(self._fits(condition, kind), self._fails(then, kind))
            second = self._met(self._fails(condition, kind), self._fails(other, kind))
            return _distinct([*first, *second])

        return Claim(holds, fails)

    def _value_claims(self, schema: Schema, kind: str) -> Iterator[Claim]:
        lists = [[schema["const"]]] if "const" in schema else []
        lists += [listed(schema, "enum")] if "enum" in schema else []
        for values in lists:
            of_kind = [value for value in values if kind_of(value) == kind]
            if kind in ("array", "object"):
                schemas = [schema_of_value(value) for value in of_kind]
                yield _unseeing(self._any_claim(schemas, kind, watched=False))
            else:
                yield self._scalar_claim(of_kind, kind)

    def _scalar_claim(self, values: list[Any], kind: str) -> Claim:
        if kind == "number":
            return Claim(
                lambda: [NumberForm(values=frozenset(values))] if values else [],
                lambda: self._numbers_but(values),
            )
        if kind == "string":
            fits = [TextForm(values=tuple(dict.fromkeys(values)))] if values else []
            return Claim(lambda: fits, lambda: [TextForm(excluded=tuple(dict.fromkeys(values)))])
        chosen, every = frozenset(values), _ANY[kind].values
        return Claim(
            lambda: [ValuesForm(chosen)] if chosen else [],
            lambda: [ValuesForm(every - chosen)] if every - chosen else [],
        )

    def _numbers_but(self, values: list[Any]) -> Forms:
        """The intervals between numbers."""
        forms: Forms = [NumberForm()]
        for value in values:
            below = NumberForm(high=value, is_high_open=True)
            forms = self._met(forms, [below, NumberForm(low=value, is_low_open=True)])
        return forms

    def _dependent_claims(self, schema: Schema, watched: bool) -> Iterator[Claim]:
        """The claims of what must hold if there is a property."""
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, then in named(schema, key).items():
                also = {"required": strings(then)} if isinstance(then, list) else then
                yield self._dependent_claim(name, also, watched)

    def _dependent_claim(self, name: str, schema: Any, watched: bool) -> Claim:
        present: Forms = [ObjectForm(required=(name,))]
        return Claim(
            lambda: [
                absent_form(name),
                *self._met(present, self._fits(schema, "object", watched)),
            ],
            lambda: self._met(present, self._fails(schema, "object")),
        )

    def _closing(self, demands: Demands) -> ObjectForm | None:
        """That an object has only properties which are listed, if nothing says otherwise."""
        seen: set[str] = set()
        speakers = [
            speaker
            for text, holds in demands
            if holds
            for speaker in self._speakers(self.schemas.of(text), seen)
        ]
        lists = [speaker["properties"] for speaker in speakers if "properties" in speaker]
        are_unlisted = all(isinstance(given, Unlisted) for given in lists)
        if are_unlisted or any(key in speaker for speaker in speakers for key in _OPENING):
            return None
        listed_names = {name for speaker in speakers for name in named(speaker, "properties")}
        required = {name for speaker in speakers for name in strings(speaker.get("required"))}
        others = Names(frozenset(listed_names | required), are_others=True)
        return ObjectForm(((others, NOTHING),))

    def _speakers(self, schema: Any, seen: set[str]) -> Iterator[Schema]:
        """All schemas that speak of the same value as one, itself too."""
        if not isinstance(schema, dict):
            return
        yield schema
        inner = [part for key in ("allOf", "anyOf", "oneOf") for part in items(schema.get(key))]
        inner += [schema[key] for key in ("then", "else") if "if" in schema and key in schema]
        inner += [part for key in ("dependentSchemas",) for part in named(schema, key).values()]
        for part in inner:
            yield from self._speakers(part, seen)
        pointer = schema.get("$ref")
        if isinstance(pointer, str) and pointer not in seen:
            seen.add(pointer)
            yield from self._speakers(self.schemas.found(pointer), seen)


def schema_of_value(value: Any) -> Schema:
    """The schema of an array or object that is equal to a value."""
    if isinstance(value, list):
        consts = [{"const": item} for item in value]
        return {"type": "array", "prefixItems": consts, "items": False, "minItems": len(value)}
    return {
        "type": "object",
        "properties": {name: {"const": item} for name, item in value.items()},
        "required": list(value),
        "additionalProperties": False,
    }


def _lists_first(schema: Schema) -> bool:
    """Whether properties are listed before other schemas may list more, which come behind then."""
    return (
        next((key for key in schema if key in (*IN_PLACE, "$ref", "properties")), "")
        == "properties"
    )


def _type_claim(types: set[str], kind: str) -> Claim:
    any_form = _ANY[kind]
    if kind == "number" and "integer" in types and "number" not in types:
        return claim(NumberForm(is_integer=True), [NumberForm(is_integer=False)])
    fits = kind in types
    return Claim(lambda: [any_form] if fits else [], lambda: [] if fits else [any_form])


def _unseen(form: Any) -> Any:
    """A form of which nothing counts as evaluated, since no schema speaks of it."""
    if isinstance(form, ObjectForm):
        return replace(form, seen=Names(), are_all_seen=False)
    if isinstance(form, ArrayForm):
        return replace(form, seen=(), num_seen=0, are_all_seen=False)
    return form


def _unseeing(given: Claim) -> Claim:
    """A claim of which nothing counts as evaluated, as that of a value."""
    return Claim(lambda: [_unseen(form) for form in given.holds()], given.fails)


def _refusal(what: str) -> Callable[[], Forms]:
    def refuse() -> Forms:
        raise unsayable(what)

    return refuse


def _distinct(forms: Forms) -> Forms:
    distinct = list(dict.fromkeys(forms))
    if len(distinct) > MAX_FORMS:
        raise too_many("forms for one value", MAX_FORMS)
    return distinct
