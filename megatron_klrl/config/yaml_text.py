"""YAML as recipes use it: safe, no duplicate keys, and 1e-4 is a number."""

import re
from collections.abc import Hashable
from typing import override

import yaml

# YAML 1.1, which PyYAML follows, wants a dot and a signed exponent in a float; people write 1e-4 and mean a number.
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)$")
_FIRST_CHARACTERS = list("-+.0123456789")


class RecipeLoader(yaml.SafeLoader):
    """Safe loader that reads 1e-4 as a float and refuses a key that stands twice."""

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """The mapping of a node; a repeated key would otherwise silently lose its first value."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class RecipeDumper(yaml.SafeDumper):
    """Dumper that quotes what `RecipeLoader` would read as a number."""

    @override
    def ignore_aliases(self, data: object) -> bool:
        """Never writes &anchors: two equal lists are two lists."""
        return True


for _class in (RecipeLoader, RecipeDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _FIRST_CHARACTERS)


def parse(text: str) -> object:
    """The value a YAML text stands for.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=RecipeLoader)  # a SafeLoader


def render(value: object) -> str:
    """YAML text that `parse` reads back to the same value, in the order of the keys."""
    return yaml.dump(value, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def describe_error(error: yaml.YAMLError) -> str:
    """One line that says what is wrong and where."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{where}{problem}"
