"""YAML as people mean it: version 1.2 scalars, no key given twice, and the line of every syntax error."""

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from lora.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `1e-5` is text, `no` is false, `1:30` is 90 and `010` is 8; 1.2 reads as written."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            line = key.start_mark.line + 1
            if not isinstance(name, Hashable):
                continue  # the base class has the words for it
            if name in first:
                problem = f"the key '{name}' is given twice (first on line {first[name]}); keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[name] = line
        return super().construct_mapping(node, deep=deep)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan")
    return float(text)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _starts) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _starts)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def parse(text: str, *, source: str) -> Any:
    """Return the value that YAML text stands for.

    Raises ConfigError with `source`, line and column for a syntax error or a key that is given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source}{_place(error.problem_mark)}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML ({str(error).splitlines()[0]})") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply; a run file has sections and keys only") from None


def _place(mark: yaml.Mark | None) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


class _Dumper(yaml.SafeDumper):
    """Writes text on one line, in quotes where a 1.2 reader would take it for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = text.isprintable() and not _NOT_TEXT.fullmatch(text)
    return dumper.represent_scalar(_TEXT, text, style=None if plain else '"')


_NOT_TEXT = re.compile("|".join(pattern for pattern, _ in _SCALARS.values()))
_TEXT = "tag:yaml.org,2002:str"
_Dumper.add_representer(str, _text)


def inline(value: object) -> str:
    """Return a value as one line of YAML, readable by 1.1 and 1.2 readers alike."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
