"""Pages of headings, text, tables and images, rendered as Markdown and as a self-contained HTML file."""

import base64
import dataclasses
import html
import pathlib
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Heading:
    """The heading of a section."""

    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A bulleted list."""

    texts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Code:
    """A block of commands."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first ``text_columns`` columns are left-aligned text, the others right-aligned numbers.

    Line breaks in cells are kept.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclasses.dataclass(frozen=True)
class Image:
    """A PNG or SVG file in the page's folder."""

    file: pathlib.Path
    alt: str


INK, PAPER = "#1f2328", "#ffffff"  # of plots; in an SVG they become the page's colors
Block = Heading | Text | Items | Code | Table | Image


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Renders a page as Markdown, which refers to the image files."""
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
            case Table(header, rows, text_columns):
                lines.append("| " + " | ".join(header) + " |")
                lines.append("|" + "---|" * text_columns + "--:|" * (len(header) - text_columns))
                lines += ["| " + " | ".join(_escape_cell(cell) for cell in row) + " |" for row in rows]
            case Image(file, alt):
                lines.append(f"![{alt}]({file.name})")
        lines.append("")
    return "\n".join(lines)


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; color: light-dark(#1f2328, #e6edf3);
  background: light-dark(#ffffff, #0d1117); max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: break-word; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid light-dark(#d1d9e0, #3d444d); padding: .25rem .75rem; text-align: right;
  white-space: nowrap; }
.wide { font-size: .72rem; line-height: 1.3; }
.wide th, .wide td { padding: .25rem; }
.wide th { white-space: normal; }
.text { text-align: left; white-space: normal; }
.text:first-child { position: sticky; left: 0; background: light-dark(#ffffff, #0d1117); }
th.text { white-space: nowrap; }
th[aria-sort] { background: light-dark(#ddf4ff, #121d2f); }
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
th button::after { content: " \\2195"; opacity: .5; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
pre { background: light-dark(#f6f8fa, #151b23); padding: .75rem; overflow-x: auto; }
img { max-width: min(100%, 56rem); }
svg { display: block; width: 100%; max-width: 40rem; height: auto; margin: 1rem 0; }
div { overflow-x: auto; }
"""

_WIDE = 8  # columns beyond which a table is set in small print

# A click on a column's title sorts by its numbers, largest first, or by its texts; another click reverses the order.
# Cells without a value stay at the end.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const isText = head.classList.contains("text"), before = head.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : !isText;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const read = row => {
        const text = row.cells[column].textContent;
        return isText ? text : parseFloat(text.replaceAll(",", ""));
      };
      body.append(...[...body.rows].sort((one, other) => {
        const [x, y] = descending ? [read(other), read(one)] : [read(one), read(other)];
        if (isText) return x.localeCompare(y);
        if (isNaN(x) || isNaN(y)) return isNaN(read(one)) - isNaN(read(other));
        return x - y;
      }));
    });
  });
}
"""


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """Renders a page as HTML that contains its images and needs no network.

    Tables can be sorted, and the page adapts to narrow screens and dark mode.
    """
    parts = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case Text(text):
                parts.append(f"<p>{_render_inline(text)}</p>")
            case Items(texts):
                parts.append("<ul>" + "".join(f"<li>{_render_inline(text)}</li>" for text in texts) + "</ul>")
            case Code(text):
                parts.append(f"<pre>{html.escape(text)}</pre>")
            case Table(header, rows, text_columns):
                head = _render_row("th", header, text_columns)
                body = "".join(f"<tr>{_render_row('td', row, text_columns)}</tr>" for row in rows)
                table = '<table class="wide">' if len(header) > _WIDE else "<table>"
                parts.append(f"<div>{table}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")
            case Image(file, alt) if file.suffix == ".svg":
                parts.append(_render_svg(file.read_text(), alt))
            case Image(file, alt):
                data = base64.b64encode(file.read_bytes()).decode()
                parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')
    title = html.escape(title)
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{viewport}<title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _render_svg(text: str, alt: str) -> str:
    """Returns the element of an SVG file, with the page's colors of text and background."""
    element = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "transparent")
    return element.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)


def _render_row(tag: str, row: Sequence[str], text_columns: int) -> str:
    classes = [' class="text"' if i < text_columns else "" for i in range(len(row))]
    return "".join(f"<{tag}{class_}>{_render_inline(cell)}</{tag}>" for class_, cell in zip(classes, row, strict=True))


def _render_inline(text: str) -> str:
    """Escapes text and renders line breaks, and Markdown's ``code`` and **strong**."""
    parts = html.escape(text).replace("\n", "<br>").split("`")
    with_code = "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    parts = with_code.split("**")
    return "".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts))


def strip_markup(text: str) -> str:
    """Removes Markdown's ``code`` and **strong** marks."""
    return text.replace("**", "").replace("`", "")
