"""Writes docs/configuration.md from the dataclasses and comments of stf_jax/config.py: ``make docs``."""

import ast
import dataclasses
import pathlib
import typing
from collections.abc import Iterator

from stf_jax import config

PAGE = pathlib.Path(__file__).parent / "configuration.md"
_HEAD = """# Configuration

For people who write a config or change a value on the command line. After this page you know every key, its default and
its meaning. `make docs` generates the page from [stf_jax/config.py](../stf_jax/config.py).

A config file defines `get_config(arg)`, starts from `stf_jax.config.default_config()` and changes what it needs. An
option such as `--config.data.max_length=1024` changes a value on the command line. If a key is unknown or a value is
out of its range, the command ends before it loads anything. A config of several stages names them in `run` and has
their changes in `stages`, as [configs/demo.py](../configs/demo.py) does.
"""


def comments(source: str) -> dict[tuple[str, str], str]:
    """The comment of each field, by class and field: on its line, or on the lines before it."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        for field in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                end = (field.end_lineno or 0) - 1
                own = lines[end][field.end_col_offset or 0 :].strip()
                first = field.lineno - 2
                above = []
                while lines[first].strip().startswith("#"):
                    above.insert(0, lines[first].strip())
                    first -= 1
                text = " ".join(part.lstrip("# ") for part in (*above, own) if part)
                found[node.name, field.target.id] = text
    return found


def sections(kind: type, path: str = "") -> Iterator[tuple[str, type]]:
    """A config class and those below it, each with the path of its keys."""
    yield path, kind
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from sections(typing.cast(type, hint), f"{path}{field.name}.")


def page() -> str:
    """The page as Markdown."""
    meanings = comments(pathlib.Path(config.__file__).read_text())
    parts = [_HEAD]
    for path, kind in sections(config.TrainConfig):
        hints = typing.get_type_hints(kind)
        title = f"`{path.removesuffix('.')}`" if path else "The run"
        summary = (kind.__doc__ or "").strip().splitlines()[0]
        parts.append(f"\n## {title}\n\n{summary}\n\n| key | default | meaning |\n|---|---|---|\n")
        for field in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(hints[field.name]):
                meaning = meanings[kind.__name__, field.name].replace("|", "\\|")
                parts.append(f"| `{path}{field.name}` | `{field.default!r}` | {meaning} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
