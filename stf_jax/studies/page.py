"""A page of headings, sentences, tables and images, as Markdown and as one file of HTML."""

import base64
import dataclasses
import html
import pathlib
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Heading:
    """Of a section."""

    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Code:
    """Commands."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header; behind the first ``words`` columns stand figures, to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclasses.dataclass(frozen=True)
class Image:
    """A PNG beside the page."""

    file: pathlib.Path
    says: str


Block = Heading | Text | Items | Code | Table | Image


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page, with images beside it."""
    lines = [f"# {title}", ""]
    for block in blocks:
        match block:
            case Heading(text):
                lines.append(f"## {text}")
            case Text(text):
                lines.append(text)
            case Items(texts):
                lines += [f"- {text}" for text in texts]
            case Code(text):
                lines += ["```", text, "```"]
            case Table(header, rows, words):
                lines.append("| " + " | ".join(header) + " |")
                lines.append("|" + "---|" * words + "--:|" * (len(header) - words))
                lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            case Image(file, says):
                lines.append(f"![{says}]({file.name})")
        lines.append("")
    return "\n".join(lines)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #d1d9e0; padding: .25rem .75rem; text-align: right; white-space: nowrap; }
.words { text-align: left; white-space: normal; }
pre { background: #f6f8fa; padding: .75rem; overflow-x: auto; }
img { max-width: 100%; }
div { overflow-x: auto; }
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as HTML that needs no other file."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case Text(text):
                parts.append(f"<p>{_inline(text)}</p>")
            case Items(texts):
                parts.append("<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>")
            case Code(text):
                parts.append(f"<pre>{html.escape(text)}</pre>")
            case Table(header, rows, words):
                head = _cells("th", header, words)
                body = "".join(f"<tr>{_cells('td', row, words)}</tr>" for row in rows)
                parts.append(f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")
            case Image(file, says):
                data = base64.b64encode(file.read_bytes()).decode()
                parts.append(f'<img alt="{html.escape(says)}" src="data:image/png;base64,{data}">')
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _cells(tag, row, words):
    kinds = [' class="words"' if i < words else "" for i in range(len(row))]
    return "".join(f"<{tag}{kind}>{_inline(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))


def _inline(text):
    """Escaped, with ``code`` and **strong** of Markdown."""
    parts = html.escape(text).split("`")
    marked = "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    parts = marked.split("**")
    return "".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts))


def plain(text: str) -> str:
    """Without Markdown's marks."""
    return text.replace("**", "").replace("`", "")
