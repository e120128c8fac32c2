"""Strict conversion between YAML and frozen dataclasses: no key is ignored and no value is converted."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from openpae.runtime.names import did_you_mean

T = TypeVar("T")

PRESETS = Path(__file__).parent / "configs"
_LARGEST = 2**16
"""Largest size in bytes of a config file; parsing larger ones could take minutes."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 5, 5


def added(default: Any) -> Any:
    """A field that older configs lack, and whose default keeps their behaviour.

    Names of study folders leave it out at its default, so old folders keep their names.
    """
    return dataclasses.field(default=default, metadata={"added": True})


def from_dict(cls: type[T], data: Mapping[str, Any], at: str = "") -> T:
    """Build a config from the plain data of a YAML file.

    Args:
        cls: a frozen dataclass whose fields are bool, int, float, str, Path, Literal, a tuple of those,
            another config, or one of these | None. In a field for one of several configs, the key `kind`
            names the class; the default is the first.
        data: one key per field; fields with a default may be left out.
        at: path of `data` in the file ("optim"), for messages.

    Raises:
        ValueError: a key is unknown or missing, or the config refuses a value.
        TypeError: a value has the wrong type; only int to float and str to Path are converted.
    """
    if not isinstance(data, Mapping):
        raise TypeError(
            f"{at or cls.__name__} must be a mapping of keys, got {_shown(data)} ({_type_name(data)})"
        )
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(_name(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
            raise ValueError(f"unknown key {_join(at, key)}; {hint}")
    required = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [_join(at, name) for name in required if name not in data]:
        raise ValueError(f"missing key {', '.join(missing)}; it has no default")
    return cls(**{key: _convert(hints[key], value, _join(at, key)) for key, value in data.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The plain data of a config: `from_dict(type(config), to_dict(config)) == config`."""
    hints = typing.get_type_hints(type(config))
    plain = {field.name: _to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    for name in plain:
        if len(_configs_of(hints[name])) > 1:
            plain[name] = {"kind": type(getattr(config, name)).__name__, **plain[name]}
    return plain


def changed(config: T, changes: dict[str, Any], at: str = "") -> T:
    """A copy of a config with some fields changed: `changed(run, {"loss.ssr": 0.2, "loop.seed": 1})`.

    Args:
        config: any frozen config.
        changes: dotted path of a field -> its new value as plain data.
        at: path of the config in a larger one, for messages.

    Raises:
        ValueError, TypeError: a field is unknown, or see `from_dict`.
    """
    if not changes:
        return config
    data = to_dict(config)
    for path, value in changes.items():
        *parents, name = path.split(".")
        inner = data
        for parent in parents:
            if not isinstance(inner.get(parent), dict):
                known = ", ".join(sorted(inner))
                raise ValueError(
                    f"unknown key {at}.{path}; {parent!r} is none of {known}, or holds no fields"
                )
            inner = inner[parent]
        inner[name] = value
    return from_dict(type(config), data, at)


def load(cls: type[T], path: str | Path) -> T:
    """Read a config file. Its key `kind` names the class, the others are the fields.

    Args:
        cls: the expected class.
        path: a YAML file, or the name of a preset such as "tokenizer/dinov2-l-d32".

    Raises:
        FileNotFoundError: neither a file nor a preset.
        ValueError, TypeError: not YAML, another kind, or see `from_dict`.
    """
    return load_one_of([cls], path)


def load_one_of(classes: Sequence[type[T]], path: str | Path) -> T:
    """`load` for a config of one of several classes."""
    file = find(path)
    data = read_yaml(file)
    kind = data.pop("kind", None)
    known = {cls.__name__: cls for cls in classes}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{file} is of kind {_shown(kind)}, but a {' or a '.join(known)} is needed here")
    try:
        return from_dict(known[kind], data)
    except (ValueError, TypeError) as error:
        same = TypeError if isinstance(error, TypeError) else ValueError
        raise same(f"{file}: {error}") from None


def save(config: Any, path: Path) -> None:
    """Write a config atomically as YAML for `load`.

    Raises:
        TypeError: the config has a field `kind`, which is the key for its class.
        OSError: the file cannot be written.
    """
    data = to_dict(config)
    if "kind" in data:
        raise TypeError(f"{type(config).__name__} cannot be saved with a field 'kind'; rename the field")
    text = yaml.safe_dump({"kind": type(config).__name__, **data}, sort_keys=False, width=100)
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.openpae-partial")
    try:
        partial.unlink(missing_ok=True)  # left by a kill, or a link with this name
        with partial.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


def find(path: str | Path) -> Path:
    """The file of a path or of a preset's name.

    Raises:
        FileNotFoundError: neither exists; the message lists the presets.
    """
    if Path(path).is_file():
        return Path(path)
    if (preset := PRESETS / f"{path}.yaml").is_file():
        return preset
    known = preset_names()
    hint = did_you_mean(str(path), known)
    raise FileNotFoundError(
        f"no config file or preset {str(path)!r}; {hint + ' ' if hint else ''}presets: {', '.join(known)}"
    )


def preset_names() -> list[str]:
    """Names of all presets, such as tokenizer/tiny."""
    return sorted(file.relative_to(PRESETS).with_suffix("").as_posix() for file in PRESETS.rglob("*.yaml"))


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file is too large, not YAML, no mapping, or holds a key twice.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} must be a file, got a folder, a pipe or a device")
    if (size := file.stat().st_size) > _LARGEST:
        raise ValueError(f"{file} is no config: it has {size:,} bytes, at most {_LARGEST:,} are read")
    content = file.read_bytes()
    try:
        data = yaml.load(content.decode("utf-8"), Loader=_UniqueKeyLoader)
    except Exception as error:  # PyYAML raises any error at a wrong tag, date or depth
        raise ValueError(f"{file} is not valid YAML: {_abridged(str(error))}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold keys and values, got {_type_name(data)}")
    return data


def check_fields(config: Any, at: str = "", /, **allowed: str) -> None:
    """Check the numbers of a config in its `__post_init__`. Every number must be finite, named here or not.

    Args:
        config: a dataclass. Values other than numbers pass; every item of a tuple is checked.
        at: prefix of field names in messages ("optim.").
        allowed: field -> interval, such as "[1, inf)" or "(0, 1]".

    Raises:
        ValueError: a number is not finite, or outside of its interval.
    """
    for name, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config)):
        for number in value if isinstance(value, tuple) else (value,):
            check_number(f"{at}{name}", number, allowed.get(name, "(-inf, inf)"), value)


def check_number(name: str, number: Any, interval: str, shown: Any = None) -> None:
    """Raise ValueError for a number outside of an interval such as "[1, inf)". Other types pass.

    NaN and infinity are in no interval. The message shows `name`, and `shown` in place of the number.
    """
    low, high = map(float, interval[1:-1].split(","))
    if not isinstance(number, int | float) or low < number < high:
        return
    if (number == low and interval[0] == "[") or (number == high and interval[-1] == "]"):
        return
    if isinstance(number, float) and not math.isfinite(number):
        wanted = "be a finite number"
    elif high < 1000:  # a larger bound only catches mistakes
        wanted = f"lie in {interval}"
    elif number <= low:
        wanted = f"be {'>=' if interval[0] == '[' else '>'} {low:g}"
    else:
        wanted = f"be <= {high:g}"
    raise ValueError(f"{name} must {wanted}, got {_shown(number if shown is None else shown)}")


def differences(old: Any, new: Any) -> list[str]:
    """Fields that differ between two configs of one class, as "optim.lr: 0.1 -> 0.2"."""
    a, b = _flatten(to_dict(old)), _flatten(to_dict(new))
    absent = "(absent)"
    return [
        f"{key}: {a.get(key, absent)} -> {b.get(key, absent)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, absent) != b.get(key, absent)
    ]


class _UniqueKeyLoader(yaml.SafeLoader):
    """Raises an error at equal keys, where PyYAML keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
        twice = sorted(_name(key) for key, count in keys.items() if count > 1)
        if twice:
            raise yaml.YAMLError(f"key {', '.join(twice)} stands twice in one mapping")
        return super().construct_mapping(node, deep)


def _convert(hint: Any, value: Any, at: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if len(choices := _configs_of(hint)) > 1:
            return _one_of(choices, value, at)
        (inner,) = (arg for arg in args if arg is not type(None))
        return _convert(inner, value, at)
    if origin is Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise ValueError(f"{at} must be one of {', '.join(map(repr, args))}, got {_shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{at} must be a list, got {_shown(value)} ({_type_name(value)})")
        inner_types = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(value) != len(inner_types):
            raise ValueError(f"{at} must hold {len(inner_types)} values, got {len(value)}")
        return tuple(
            _convert(t, v, f"{at}[{i}]") for i, (t, v) in enumerate(zip(inner_types, value, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, at)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{at} must be below 1.8e308, got {_shown(value)}") from None
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} must be a finite number, got {value!r}")
    if hint is int and type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"{at} must be below 2^63, got {_shown(value)}")
    if hint is Path and isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"{at} must be a path without character 0, got {_shown(value)}")
        return Path(value)
    if type(value) is not hint:
        message = f"{at} must be {hint.__name__}, got {_shown(value)} ({_type_name(value)})"
        if hint in (int, float) and isinstance(value, str) and (number := _number(value)) is not None:
            # YAML 1.1 requires a dot in the mantissa: 2e-4 is text, 2.0e-4 a number.
            if hint is float:
                message += f"; in YAML write {yaml.safe_dump(number).split()[0]}"
            elif number.is_integer():
                message += f"; in YAML write {int(number)}"
        raise TypeError(message)
    return value


def _configs_of(hint: Any) -> list[type]:
    """The config classes in a union type; fewer than two if the field has no choice."""
    args = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()
    return [arg for arg in args if isinstance(arg, type) and dataclasses.is_dataclass(arg)]


def _one_of(choices: list[type], value: Any, at: str) -> Any:
    known = {cls.__name__: cls for cls in choices}
    if not isinstance(value, Mapping):
        raise TypeError(f"{at} must be a mapping of keys, got {_shown(value)} ({_type_name(value)})")
    kind = value.get("kind", choices[0].__name__)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{_join(at, 'kind')} must be one of {', '.join(known)}, got {_shown(kind)}")
    return from_dict(known[kind], {key: item for key, item in value.items() if key != "kind"}, at)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flatten(data: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, _join(at, key)) if isinstance(value, Mapping) else {_join(at, key): value}
    return flat


def _join(at: str, key: Any) -> str:
    return f"{at}.{_name(key)}" if at else _name(key)


def _name(key: Any) -> str:
    return key[:80] if isinstance(key, str) and key.isprintable() else _shown(key)


def _shown(value: Any) -> str:
    """A short form of a value for messages; YAML aliases can make a value huge."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return f"a very large {_type_name(value)}"


def _abridged(message: str) -> str:
    """One line with both ends of a message: PyYAML repeats long names and gives the position last."""
    line = " ".join(message.split())
    return line if len(line) <= 400 else f"{line[:200]} ... {line[-200:]}"


def _type_name(value: Any) -> str:
    return type(value).__name__
