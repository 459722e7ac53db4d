"""A request's JSON schema, made ready for the grammar compiler: checked, bounded, and with nothing it would loosen.

What the compiler cannot express is refused by name. Where a bound cannot be kept exactly, the schema becomes stricter,
never looser, so that an answer always validates against what was asked for. Keywords that JSON Schema does not know
are annotations, as its specification says. Only what can be reached from the root is looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from nybble.core.errors import ConfigError
from nybble.engine.regex_rules import check_regex

Node = dict[str, Any]

MAX_CHARS = 1 << 18
MAX_DEPTH = 64
MAX_NODES = 5000
MAX_PROPERTIES = 1000  # of one object: the compiler's time grows with their square
MAX_CHOICES = 5000  # of one enum
MAX_COUNT = 100_000  # of items, properties or characters: more than fits a context
MAX_FORCED_CHARS = 8192  # of a text that must be written as it is: it is computed anew at every step
MAX_STEPS = 10_000  # a multipleOf without its decimal point: the compiler's time grows with its square
MAX_EXACT = 2**53 - 1  # larger integers are rounded by readers of JSON, and by the compiler

_REFUSED = frozenset((
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
    "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties",
    "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary", "divisibleBy", "disallow",
    "extends", "x-guidance",
))  # fmt: skip
_ONE = ("additionalProperties", "additionalItems", "items")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties")
_MERGING = frozenset(("anyOf", "oneOf", "$ref"))  # a schema with one of these applies to the same value as itself
_OTHERS = frozenset(("additionalProperties", "patternProperties"))
_OBJECT = frozenset(("properties", "required", "minProperties")) | _OTHERS
_TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # not 0000, which most calendars lack
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# Formats that the compiler takes less strictly than most readers (days of a month, leap seconds) become patterns.
_OWN_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
_FORMATS = frozenset(("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")) | frozenset(_OWN_FORMATS)


def prepare_schema(schema: str | Mapping[str, Any]) -> Node:
    """A copy of the schema that the grammar compiler takes at its word.

    Raises ConfigError naming the keyword that cannot be expressed, or the limit that was passed.
    """
    root = _plain_json(schema)
    if root is True:
        root = {}
    if not isinstance(root, dict):
        raise ConfigError("the JSON schema must be an object")
    walk = _Walk(root)
    walk.run()
    walk.close_objects()
    return walk.root


def _plain_json(schema: str | Mapping[str, Any]) -> object:
    """The schema as JSON's own types, copied. Limits its size and depth."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        if len(text) > MAX_CHARS:
            raise ConfigError(f"the JSON schema has {len(text)} characters, more than {MAX_CHARS}")
        plain = json.loads(text, parse_constant=_no_constant)
        json.dumps(plain, ensure_ascii=False).encode()
    except RecursionError:
        raise ConfigError(f"the JSON schema is nested more than {MAX_DEPTH} levels deep") from None
    except UnicodeEncodeError:
        raise ConfigError("the JSON schema holds a lone surrogate: it is not valid Unicode") from None
    except (TypeError, ValueError) as e:  # a Python object, an integer of thousands of digits, ...
        raise ConfigError(f"the JSON schema is not valid JSON: {e}") from None
    level = [plain]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return plain
    raise ConfigError(f"the JSON schema is nested more than {MAX_DEPTH} levels deep")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _children(node: object) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


class _Walk:
    """Visits every schema that can be reached, checks it, and makes it stricter where that is needed."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self._seen: dict[int, Node] = {}
        self._todo: list[tuple[Any, str]] = [(root, "#")]
        self._multiples: set[Fraction] = set()
        self._checks: dict[str, Callable[[Node, str, Any], None]] = {
            "$ref": self._ref,
            "type": self._type,
            "enum": self._enum,
            "const": self._const,
            "format": self._format,
            "pattern": self._pattern,
            "required": self._required,
            "minProperties": self._min_properties,
            "multipleOf": self._multiple_of,
        }
        self._checks |= dict.fromkeys(("minItems", "minLength"), self._at_least)
        self._checks |= dict.fromkeys(("maxItems", "maxLength", "maxProperties"), self._at_most)
        self._checks |= dict.fromkeys(("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"), self._bound)
        self._checks |= dict.fromkeys(_ONE, self._one) | dict.fromkeys(_LISTS, self._list)
        self._checks |= dict.fromkeys(_MAPS, self._map)

    def run(self) -> None:
        while self._todo:
            node, where = self._todo.pop()
            if isinstance(node, bool) or id(node) in self._seen:
                continue
            if not isinstance(node, dict):
                raise ConfigError(f"the JSON schema at {where} must be an object or a boolean")
            self._seen[id(node)] = node
            if len(self._seen) > MAX_NODES:
                raise ConfigError(f"the JSON schema has more than {MAX_NODES} parts")
            self._visit(node, where)

    def close_objects(self) -> None:
        """Where a schema names the properties of an object and is silent about others, there are none.

        JSON Schema would let any follow, and a model that may go on writing properties does. Schemas that are made of
        several for one object stay as they are: none of the parts knows the names of the others.
        """
        nodes = list(self._seen.values())
        if any("allOf" in node or (_MERGING & node.keys() and _OBJECT & node.keys()) for node in nodes):
            return
        for node in nodes:
            names = node.get("properties")
            if not names or _OTHERS & node.keys():
                continue
            if names.keys() >= set(node.get("required", ())) and len(names) >= node.get("minProperties", 0):
                node["additionalProperties"] = False

    def _visit(self, node: Node, where: str) -> None:
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        if node is not self.root and ("$id" in node or "$schema" in node or isinstance(node.get("id"), str)):
            name = next(key for key in ("$id", "$schema", "id") if key in node)
            raise _refused(name, where, "only the root of the schema may have one")
        for keyword in list(node):
            if keyword in _REFUSED:
                raise _refused(keyword, where, "the grammar cannot express it")
            if keyword in self._checks:
                self._checks[keyword](node, f"{where}/{keyword}", node[keyword])

    # Each of the following looks at one keyword: the schema it stands in, where, and its value.

    def _ref(self, node: Node, where: str, value: Any) -> None:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise _refused("$ref", where, f"only references inside the schema (#/…) are followed, not {value!r:.80}")
        self._todo.append((self._resolve(value, where), value))

    def _resolve(self, reference: str, where: str) -> Any:
        target: Any = self.root
        for part in reference.split("/")[1:]:
            if "%" in part:
                raise _refused("$ref", where, "percent escapes are not supported")
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and part.isdecimal() and len(part) < 6 and int(part) < len(target):
                target = target[int(part)]
            else:
                raise ConfigError(f"the JSON schema has no {reference!r:.80}, which {where} refers to")
        return target

    def _type(self, node: Node, where: str, value: Any) -> None:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
            raise ConfigError(f"the JSON schema at {where} is {value!r:.80}, but the types are {', '.join(_TYPES)}")

    def _enum(self, node: Node, where: str, value: Any) -> None:
        if not isinstance(value, list) or not value or len(value) > MAX_CHOICES:
            raise ConfigError(f"the JSON schema at {where} must be a list of 1 to {MAX_CHOICES} values")
        for item in value:
            self._const(node, where, item)

    def _const(self, node: Node, where: str, value: Any) -> None:
        todo = [value]
        while todo:
            item = todo.pop()
            todo += _children(item)
            if isinstance(item, str):
                if len(item) > MAX_FORCED_CHARS:
                    raise ConfigError(
                        f"the JSON schema at {where} has a text of more than {MAX_FORCED_CHARS} characters"
                    )
                # The compiler writes control characters as \uXXXX only, which is switched off (see grammar.py).
                if any((char < " " and char not in "\b\t\n\f\r") or char == "\x7f" for char in item):
                    raise _refused(where.rsplit("/", 1)[-1], where, f"{item!r:.80} holds a control character")
            elif isinstance(item, int | float) and not isinstance(item, bool):
                self._exact(where, item)

    def _exact(self, where: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"the JSON schema at {where} must be a number, not {value!r:.80}")
        if not abs(value) <= MAX_EXACT or (value and abs(value) < 1e-15):
            raise _refused(where.rsplit("/", 1)[-1], where, f"{value!r:.80} is too large or too small to be exact")
        return value

    def _bound(self, node: Node, where: str, value: Any) -> None:
        keyword = where.rsplit("/", 1)[-1]
        upper = keyword.lower().endswith("maximum")
        if isinstance(value, bool):  # draft 4: the bound itself stands in the other keyword
            del node[keyword]
            keyword = "maximum" if upper else "minimum"
            if value and keyword in node:
                node[keyword] = self._inside(self._exact(where, node[keyword]), upper)
            return
        beyond = isinstance(value, int | float) and math.isfinite(value) and (value > 0) == upper
        if beyond and abs(value) > MAX_EXACT:
            node[keyword] = MAX_EXACT if upper else -MAX_EXACT
            return
        self._exact(where, value)
        if keyword.startswith("exclusive"):
            node[keyword] = self._inside(value, upper)

    def _inside(self, value: float, upper: bool) -> float:
        """The compiler lets an open bound in if it is whole and the other bound is near: a closer one does not."""
        margin = max(abs(value), 1) * 1e-12
        return value if value % 1 else value - margin if upper else value + margin

    def _multiple_of(self, node: Node, where: str, value: Any) -> None:
        if self._exact(where, value) <= 0:
            raise ConfigError(f"the JSON schema at {where} must be above 0, not {value!r:.80}")
        multiple = Fraction(repr(value))
        decimal = 1
        while (multiple * decimal).denominator > 1:
            decimal *= 10
        self._multiples.add(multiple)
        # The compiler merges multiples in 32 bits.
        scale = math.lcm(*(other.denominator for other in self._multiples))
        together = math.lcm(*(int(other * scale) for other in self._multiples)) * scale
        if decimal > MAX_STEPS or multiple * decimal > MAX_STEPS or together > 2**31:
            raise _refused("multipleOf", where, f"{value} has too many digits")

    def _count(self, where: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"the JSON schema at {where} must be an integer of at least 0, not {value!r:.80}")
        return value

    def _at_least(self, node: Node, where: str, value: Any) -> None:
        keyword = where.rsplit("/", 1)[-1]
        node[keyword] = self._count(where, value)
        if node[keyword] > MAX_COUNT:
            raise _refused(keyword, where, f"it is more than {MAX_COUNT}")

    def _at_most(self, node: Node, where: str, value: Any) -> None:
        node[where.rsplit("/", 1)[-1]] = min(self._count(where, value), MAX_COUNT)

    def _min_properties(self, node: Node, where: str, value: Any) -> None:
        self._at_least(node, where, value)
        required = node.get("required")
        certain = len(required) if isinstance(required, list) else 0
        closed = node.get("additionalProperties") is False and not node.get("patternProperties")
        if not closed and node["minProperties"] > certain + 1:
            raise _refused("minProperties", where, "the grammar cannot keep free names from being written twice")

    def _required(self, node: Node, where: str, value: Any) -> None:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"the JSON schema at {where} must be a list of names")
        if len(value) > MAX_PROPERTIES:
            raise ConfigError(f"the JSON schema at {where} has more than {MAX_PROPERTIES} names")
        node["required"] = list(dict.fromkeys(value))

    def _format(self, node: Node, where: str, value: Any) -> None:
        kinds = node.get("type", "string")
        if "string" not in (kinds if isinstance(kinds, list) else [kinds]):
            return  # formats of numbers are annotations
        if not isinstance(value, str) or value not in _FORMATS:
            raise _refused("format", where, f"{value!r:.80} is not known (known: {', '.join(sorted(_FORMATS))})")
        if value in _OWN_FORMATS:
            del node["format"]
            self._require_pattern(node, _OWN_FORMATS[value])

    def _require_pattern(self, node: Node, pattern: str) -> None:
        if "pattern" not in node:
            node["pattern"] = pattern
        elif isinstance(node.setdefault("allOf", []), list):
            node["allOf"] = [*node["allOf"], {"pattern": pattern}]

    def _pattern(self, node: Node, where: str, value: Any) -> None:
        if not isinstance(value, str):
            raise ConfigError(f"the JSON schema at {where} must be a string")
        check_regex(value, f"the pattern at {where}")

    def _one(self, node: Node, where: str, value: Any) -> None:
        if isinstance(value, list):  # `items` before draft 2020-12
            self._list(node, where, value)
        else:
            self._todo.append((value, where))

    def _list(self, node: Node, where: str, value: Any) -> None:
        if not isinstance(value, list):
            raise ConfigError(f"the JSON schema at {where} must be a list of schemas")
        self._todo += [(item, f"{where}/{i}") for i, item in enumerate(value)]

    def _map(self, node: Node, where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"the JSON schema at {where} must be an object of schemas")
        if len(value) > MAX_PROPERTIES:
            raise ConfigError(f"the JSON schema at {where} has more than {MAX_PROPERTIES} names")
        if where.endswith("/patternProperties"):
            for pattern in value:
                check_regex(pattern, f"the pattern at {where}")
        self._todo += [(item, f"{where}/{name}"[:200]) for name, item in value.items()]


def _refused(keyword: str, where: str, reason: str) -> ConfigError:
    return ConfigError(f"the JSON schema uses {keyword!r} at {where}, which is not supported: {reason}")


def is_simple(schema: Node) -> bool:
    """Whether compiling takes a time that grows with the size of the schema only: nothing that multiplies it out."""
    todo: list[Any] = [schema]
    count = 0
    while todo:
        node = todo.pop()
        count += 1
        if isinstance(node, dict) and ("allOf" in node or "oneOf" in node or "patternProperties" in node):
            return False
        if isinstance(node, dict) and ("anyOf" in node or "$ref" in node or "enum" in node):
            others = set(node) - _ANNOTATIONS
            if len(others) > 1 and others not in _UNMIXED:
                return False
        todo += _children(node)
    return count <= 1000


_ANNOTATIONS = frozenset(("$defs", "definitions", "$schema", "$id", "title", "description", "default", "examples"))
_UNMIXED = (frozenset(("enum", "type")),)
