"""JSON schemas that answers are held to: compiled once, all of their references within themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

# Of these keywords the value is data, in which "$ref" means nothing.
DATA = frozenset({"const", "enum", "default", "examples"})
REFERENCES = ("$ref", "$dynamicRef")


def compiled(schema: dict[str, Any]) -> Draft202012Validator:
    """A validator that fetches nothing. Raises ValueError for what is no JSON schema, or one that leads elsewhere."""
    import referencing
    from jsonschema import Draft202012Validator, SchemaError
    from referencing.jsonschema import DRAFT202012

    try:
        Draft202012Validator.check_schema(schema)
        resource = DRAFT202012.create_resource(schema)
        # Without a registry of its own jsonschema would fetch a remote $ref over the network.
        registry: Any = referencing.Registry().with_resource("", resource)
        for reference in _references(schema):
            _resolved(registry.resolver(), reference)
        validator = Draft202012Validator(schema, registry=registry)
        probes: tuple[Any, ...] = ({}, [], "", 0, None)
        for probe in probes:
            validator.is_valid(probe)
    except SchemaError as error:
        raise ValueError(f"no JSON schema: {error.json_path}: {error.message}") from None
    except RecursionError:
        raise ValueError("no usable JSON schema: it leads back to itself without end") from None
    except ValueError:
        raise
    except Exception as error:  # both libraries have errors of their own here, some of them private
        raise ValueError(f"no usable JSON schema: {error}") from None
    return validator


def _resolved(resolver: Any, reference: str) -> None:
    if not reference.startswith("#"):
        raise ValueError(f"$ref leads to {reference[:100]!r}: nothing is fetched, write it under $defs")
    resolver.lookup(reference)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in REFERENCES and isinstance(value, str):
                yield value
            elif key not in DATA:
                yield from _references(value)
