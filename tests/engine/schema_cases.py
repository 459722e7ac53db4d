"""JSON schemas to try structured output on: random ones, the same in every run, and some that people really send."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

PATTERNS = [
    "^[a-z]{2,5}$", "^[A-Z][a-z]+-[0-9]{1,4}$", r"^\d{3}-\d{4}$", "^(red|green|blue)$", "[0-9]", "^a/b[^x]?$",
    r"^\w+(\.\w+)*$", "^(?:[0-9a-f]{2}:){3}[0-9a-f]{2}$", "^é+$", "^[^\"\\\\]{1,6}$", "(?i)^(yes|no)$", "^$|^x{3,}$",
]  # fmt: skip
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
NAMES = ["id", "name", "größe", "a b", 'quo"te', "tags", "x", "nested", "back\\slash", "日本", "value", "$ref", "type"]
VALUES = [
    "",
    "red",
    'say "hi"',
    "line\nbreak",
    "日本",
    0,
    -3,
    7,
    1.5,
    -0.25,
    1e10,
    True,
    False,
    None,
    [1, "a"],
    {"k": []},
]


class Maker:
    """Makes schemas that have an answer."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def root(self) -> Schema:
        make = self._random.choice([self.object, self.object, self.object, self.array, self.referring, self.merged])
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **make(3)}

    def any(self, depth: int) -> Any:
        pick = self._random
        leaves = [self.string, self.number, self.integer, self.enum, self.const, self.union]
        trees = [self.object, self.array, self.any_of, self.one_of, self.map, self.tuple]
        if pick.random() < 0.05:
            return True
        made = pick.choice(leaves + (trees if depth > 0 else []))(depth - 1)
        if pick.random() < 0.2:
            made |= {"title": "a title", "description": "what it is", "x-order": 3, "deprecated": True}
        return made

    def string(self, _: int) -> Schema:
        pick = self._random
        kind = pick.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": pick.choice(PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": pick.choice(FORMATS)}
        low = pick.randrange(5)
        return (
            {"type": "string", "minLength": low, "maxLength": low + pick.randrange(1, 9)}
            if kind == 2
            else {"type": "string"}
        )

    def number(self, _: int) -> Schema:
        pick = self._random
        low = pick.choice([-1000, -2.5, 0, 0.001, 3, 17.25])
        made: Schema = {"type": "number"}
        if pick.random() < 0.5:
            made[pick.choice(["minimum", "exclusiveMinimum"])] = low
        if pick.random() < 0.5:
            made[pick.choice(["maximum", "exclusiveMaximum"])] = low + pick.choice([0.5, 7, 1e6])
        if pick.random() < 0.2:
            made["multipleOf"] = pick.choice([0.01, 0.5, 0.1])
        return made

    def integer(self, _: int) -> Schema:
        pick = self._random
        low = pick.choice([-300, -1, 0, 1, 99, 2**31])
        made: Schema = {"type": "integer"}
        if pick.random() < 0.6:
            made[pick.choice(["minimum", "exclusiveMinimum"])] = low
        if pick.random() < 0.6:
            made[pick.choice(["maximum", "exclusiveMaximum"])] = low + pick.choice([20, 1000, 10**9])
        if pick.random() < 0.2:
            made["multipleOf"] = pick.choice([2, 5, 7])
        return made

    def enum(self, _: int) -> Schema:
        return {"enum": self._random.sample(VALUES, self._random.randrange(1, 6))}

    def const(self, _: int) -> Schema:
        return {"const": self._random.choice(VALUES)}

    def union(self, _: int) -> Schema:
        return {"type": self._random.sample(["null", "boolean", "integer", "string", "number"], 2), "maxLength": 9}

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self._random.randrange(1, 4))]}

    def one_of(self, depth: int) -> Schema:
        kinds = [{"type": "null"}, {"type": "boolean"}, self.integer(0), {"type": "string"}, self.object(depth)]
        if self._random.random() < 0.5:  # told apart by a tag
            kinds = []
            for tag in ("cat", "dog"):
                tagged = self.object(depth)
                tagged["properties"] = {"kind": {"const": tag}, **tagged["properties"]}
                tagged["required"] = ["kind", *tagged["required"]]
                tagged.pop("maxProperties", None)
                kinds.append(tagged)
        return {"oneOf": self._random.sample(kinds, 2)}

    def object(self, depth: int) -> Schema:
        pick = self._random
        names = pick.sample(NAMES, pick.randrange(0, 5))
        made: Schema = {
            "type": "object",
            "properties": {name: self.any(depth) for name in names},
            "required": [name for name in names if pick.random() < 0.6],
        }
        if pick.random() < 0.5:
            made["additionalProperties"] = False
        elif pick.random() < 0.5:
            made["additionalProperties"] = self.any(depth)
        return made

    def map(self, depth: int) -> Schema:
        pick = self._random
        made: Schema = {"type": "object", "additionalProperties": self.any(depth), "maxProperties": 4}
        if pick.random() < 0.5:
            made["patternProperties"] = {"^s_": self.any(depth), "^n[0-9]+$": {"type": "integer"}}
        if pick.random() < 0.5:
            made["minProperties"] = 1
        return made

    def array(self, depth: int) -> Schema:
        pick = self._random
        low = pick.randrange(3)
        made: Schema = {"type": "array", "items": self.any(depth)}
        if pick.random() < 0.7:
            made |= {"minItems": low, "maxItems": low + pick.randrange(3)}
        if pick.random() < 0.2:
            made["uniqueItems"] = False
        return made

    def tuple(self, depth: int) -> Schema:
        made: Schema = {"type": "array", "prefixItems": [self.any(depth), self.any(depth)], "minItems": 2}
        made["items"] = self._random.choice([False, {"type": "integer"}])
        return made

    def referring(self, depth: int) -> Schema:
        leaf = self.any(depth - 1)
        node = {
            "type": "object",
            "properties": {"leaf": {"$ref": "#/$defs/a~1b"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["leaf"],
            "additionalProperties": False,
        }
        return {
            "type": "object",
            "properties": {"first": {"$ref": "#/$defs/node", "description": "where it starts"}, "x": self.any(depth)},
            "required": ["first"],
            "$defs": {"a/b": leaf, "node": node, "unused": {"not": {}}},
        }

    def merged(self, depth: int) -> Schema:
        parts = [
            {"type": "object", "properties": {"one": self.any(depth - 1)}, "required": ["one"]},
            {"properties": {"two": self.any(depth - 1)}, "minProperties": 1},
            {"$ref": "#/definitions/three"},
        ]
        self._random.shuffle(parts)
        three = {"type": "object", "properties": {"three": self.string(0)}, "required": ["three"]}
        return {"allOf": parts, "definitions": {"three": three}}


REALISTIC: dict[str, Schema] = {
    "person": {
        "title": "Person",
        "type": "object",
        "properties": {
            "name": {"title": "Name", "type": "string", "minLength": 1},
            "age": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 150}, {"type": "null"}], "default": None},
            "email": {"type": "string", "format": "email"},
            "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2, "default": []},
        },
        "required": ["name", "email"],
        "additionalProperties": False,
    },
    "steps of a solution": {
        "type": "object",
        "properties": {
            "steps": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"explanation": {"type": "string"}, "output": {"type": "string"}},
                    "required": ["explanation", "output"],
                    "additionalProperties": False,
                },
            },
            "final_answer": {"type": "string"},
        },
        "required": ["steps", "final_answer"],
        "additionalProperties": False,
    },
    "user interface, recursive": {
        "type": "object",
        "properties": {
            "type": {"type": "string", "enum": ["div", "button", "header", "section", "field", "form"]},
            "label": {"type": "string"},
            "children": {"type": "array", "items": {"$ref": "#"}},
            "attributes": {
                "type": "array",
                "items": {"$ref": "#/$defs/attribute"},
            },
        },
        "required": ["type", "label", "children", "attributes"],
        "additionalProperties": False,
        "$defs": {
            "attribute": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "value": {"type": "string"}},
                "required": ["name", "value"],
                "additionalProperties": False,
            }
        },
    },
    "linked list": {
        "type": "object",
        "properties": {"linked_list": {"$ref": "#/$defs/node"}},
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "required": ["linked_list"],
        "additionalProperties": False,
    },
    "invoice": {
        "type": "object",
        "properties": {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4}-[0-9]{2,6}$"},
            "date": {"type": "string", "format": "date"},
            "currency": {"enum": ["EUR", "USD", "CNY"]},
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 5,
                "items": {
                    "type": "object",
                    "properties": {
                        "text": {"type": "string", "maxLength": 40},
                        "quantity": {"type": "integer", "minimum": 1, "maximum": 999},
                        "price": {"type": "number", "minimum": 0, "multipleOf": 0.01, "maximum": 1e6},
                    },
                    "required": ["text", "quantity", "price"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["number", "date", "currency", "lines"],
        "additionalProperties": False,
    },
    "classification": {
        "type": "object",
        "properties": {
            "label": {"enum": ["positive", "negative", "neutral"]},
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["label", "confidence"],
    },
    "tagged union": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "radius": {"type": "number", "exclusiveMinimum": 0}},
                "required": ["kind", "radius"],
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "square"}, "side": {"type": "number", "exclusiveMinimum": 0}},
                "required": ["kind", "side"],
            },
        ],
        "discriminator": {"propertyName": "kind"},
    },
    "map of scores": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 100}},
    "entities": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "type": {"enum": ["PER", "ORG", "LOC"]},
                "span": {
                    "type": "array",
                    "prefixItems": [{"type": "integer", "minimum": 0}, {"type": "integer", "minimum": 0}],
                    "items": False,
                    "minItems": 2,
                },
            },
            "required": ["text", "type", "span"],
        },
    },
    "calendar event": {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "start": {"type": "string", "format": "date-time"},
            "end": {"type": "string", "format": "date-time"},
            "attendees": {"type": "array", "items": {"type": "string", "format": "email"}, "maxItems": 10},
            "id": {"type": "string", "format": "uuid"},
        },
        "required": ["title", "start", "attendees", "id"],
    },
    "inherited": {
        "$ref": "#/$defs/dog",
        "$defs": {
            "animal": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            "dog": {
                "allOf": [
                    {"$ref": "#/$defs/animal"},
                    {"type": "object", "properties": {"barks": {"type": "boolean"}}, "required": ["barks"]},
                ]
            },
        },
    },
    "64-bit numbers": {
        "type": "object",
        "properties": {"id": {"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}},
        "required": ["id"],
    },
    "draft 7 tuple": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "string"}],
        "additionalItems": False,
        "minItems": 1,
    },
}
