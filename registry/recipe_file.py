"""A recipe's file: YAML read strictly, checked by its kind, all of its errors at once, each with its line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from registry.errors import RecipeError
from registry.recipe_part import Part

MAX_BYTES = 1_000_000


def read_recipe(path: Path, kinds: Mapping[str, type[Part]]) -> Part:
    """The recipe in the file, of one of these kinds. Raises RecipeError with every error of the file."""
    text = _read(path)
    node, plain = _parse(path, text)
    if not isinstance(plain, dict):
        raise RecipeError("a recipe is a mapping of keys to values", place=str(path), fix="start with `kind: finetune`")
    kind = plain.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise RecipeError(
            f"kind is {kind!r}, and must be one of: {', '.join(kinds)}",
            place=f"{path}:{_line(node, ('kind',))}",
            fix="`ft run` takes what trains (finetune), `ft serve up` what answers (serve)",
        )
    written = set(plain)
    plain.setdefault("name", _stem(path))
    if "model" in kinds[kind].model_fields:
        plain.setdefault("model", plain["name"])
    try:
        return kinds[kind].model_validate(plain)
    except ValidationError as error:
        problems = [each for each in error.errors() if each["loc"] != ("model",) or "model" in written]
        lines = [_explain(path, node, kinds[kind], problem) for problem in problems]
        raise RecipeError(
            "\n".join(lines), fix=f"`ft recipe schema` lists every key; then `ft recipe check {path}`"
        ) from None


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise RecipeError("a recipe is a file, and this is none", place=str(path), fix=_nearest_file(path / "x"))
        if not path.is_file():
            raise RecipeError("no such recipe", place=str(path), fix=_nearest_file(path))
    except OSError as error:  # a link to itself, a name of thousands of characters
        raise RecipeError(f"cannot be read: {error.strerror}", place=str(path)[:200]) from error
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES} bytes, so hardly a recipe", place=str(path))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", place=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text ({error.reason} at byte {error.start})", place=str(path)) from error


def _nearest_file(path: Path) -> str:
    found = sorted({str(each) for folder in (path.parent, Path("recipes")) for each in folder.glob("*.y*ml")})
    near = difflib.get_close_matches(str(path), found, n=1)
    return f"did you mean {near[0]}?" if near else f"there is: {', '.join(found) or 'none yet; see `ft init`'}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: in 1.1 the key `on` is True, and so are the labels yes and on."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in each if tag != "tag:yaml.org,2002:bool"]
    for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def _parse(path: Path, text: str) -> tuple[yaml.Node | None, Any]:
    try:
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):
                line = token.start_mark.line + 1
                raise RecipeError("YAML aliases (*name) are not allowed in recipes", place=f"{path}:{line}")
        node = yaml.compose(text, Loader=_Loader)
        repeated = list(_repeated_keys(path, node))
        if repeated:
            raise RecipeError("\n".join(repeated))
        return node, yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"not valid YAML: {error.problem}", place=f"{path}:{line}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not valid YAML: {error}", place=str(path)) from error


def _repeated_keys(path: Path, node: yaml.Node | None) -> Iterator[str]:
    # PyYAML silently keeps the last of two equal keys.
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):  # a list as a key is refused later, with its own message
                if key.value in seen:
                    yield f"{path}:{key.start_mark.line + 1}: {key.value}: given twice"
                seen.add(key.value)
            yield from _repeated_keys(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated_keys(path, value)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".yaml").removesuffix(".yml").lower()


def _explain(path: Path, node: yaml.Node | None, kind: type[Part], problem: Any) -> str:
    # Of a union, pydantic names the branch too: targets.list[str].1
    *before, last = problem["loc"] or ("recipe",)
    kept = [part for part in before if "[" not in str(part)]
    place = (*kept, last) if problem["type"] == "extra_forbidden" or "[" not in str(last) else (*kept,)
    dotted = ".".join(str(part) for part in place)
    line = _line(node, place)
    if problem["type"] == "extra_forbidden":
        return f"{path}:{line}: {dotted}: unknown key{_nearest_key(kind, place)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{path}:{line}: {dotted}: {message[:1].lower() + message[1:]}{shown}"


def _line(node: yaml.Node | None, place: tuple[Any, ...]) -> int:
    """Line of the deepest part of `place` that the file has; 1 for an empty file."""
    line = node.start_mark.line + 1 if node else 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _nearest_key(kind: type[Part], place: tuple[Any, ...]) -> str:
    part: type[Part] | None = kind
    chosen = False  # the next name is one that the writer chose: a key of `dict[str, Part]`
    for name in place[:-1]:
        if chosen or isinstance(name, int):
            chosen = False
            continue
        field = part.model_fields.get(str(name)) if part else None
        chosen = field is not None and get_origin(field.annotation) is dict
        part = _part_in(field.annotation) if field else None
    keys = list(part.model_fields) if part else []
    near = difflib.get_close_matches(str(place[-1]), keys, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(keys)}" if keys else ""


def _part_in(annotation: Any) -> type[Part] | None:
    """The part in `Part`, `Part | None` or `list[Part]`."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    return next(filter(None, map(_part_in, get_args(annotation))), None)
