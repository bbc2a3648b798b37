"""HTML from plain values. Everything that a user or a file may have written goes through `text`."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import Any

from poise.report.curves import Styles


def text(words: Any) -> str:
    """Words as they are to be read, whatever characters they hold."""
    return escape(str(words))


def prose(sentence: str) -> str:
    """A sentence as HTML: what stands in backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(sentence))


def paragraphs(sentences: Iterable[str], kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return "".join(f"<p{name}>{prose(sentence)}</p>" for sentence in sentences)


def section(name: str, title: str, *content: str) -> str:
    """A part of the page with an anchor; empty where there is no content."""
    body = "".join(content)
    if not body:
        return ""
    anchor = f'<a class="anchor" href="#{name}" aria-label="link to {text(title)}">#</a>'
    return f'<section id="{name}"><h2>{text(title)} {anchor}</h2>{body}</section>'


def subhead(title: str) -> str:
    return f"<h3>{text(title)}</h3>"


def table(rows: Sequence[Sequence[str]], *, marked: Collection[int] = (), kind: str = "") -> str:
    """A table that scrolls by itself where the screen is narrow.

    Args:
        rows: the first is the head.
        marked: numbers of rows, the head not counted, to set off.
        kind: its class.
    """
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in rows[0])
    body = "".join(_row(row, k in marked) for k, row in enumerate(rows[1:]))
    label = f'role="region" tabindex="0" aria-label="table: {text(", ".join(filter(None, rows[0][:3])))}"'
    shape = (
        "scroll pairs" if len(rows[0]) == 2 and kind != "numbers" else "scroll"
    )  # pairs flow into two columns
    return (
        f'<div class="{shape}" {label}><table '
        f'class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row(cells: Sequence[str], marked: bool) -> str:
    first, *others = cells
    kind = ' class="differs"' if marked else ""
    return f'<tr{kind}><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in others)}</tr>'


def picture(uri: str, alt: str, caption: str) -> str:
    """An image with its caption; a click enlarges it."""
    shown = f'<img src="{uri}" alt="{text(alt)}" loading="lazy">'
    button = f'<button type="button" class="enlarge" title="enlarge">{shown}</button>'
    return f'<figure class="picture">{button}<figcaption>{text(caption)}</figcaption></figure>'


def plot(figure: dict[str, Any]) -> str:
    """The place of a figure that page.js draws."""
    name, title, caption = figure["id"], text(figure["title"]), text(figure["caption"])
    drawn = f'<div class="plot" id="{name}" role="img" aria-label="plot: {title}. {caption}"></div>'
    return (
        f'<figure class="chart"><h4>{title}</h4>{drawn}<figcaption>{caption}</figcaption></figure>'
    )


def legend(styles: Styles) -> str:
    """A button for each label that shows and hides its lines in all figures; none for a single label."""
    if len(styles) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" class="key" data-label="{text(label)}" aria-pressed="true">'
        f'<span class="line {style["dash"]}" style="border-color:{style["color"]}"></span>{text(label)}</button>'
        for label, style in styles.items()
    )
    return f'<div class="legend" role="group" aria-label="series">{buttons}</div>'


def toggle(name: str, choices: dict[str, str]) -> str:
    """Buttons of which one is pressed; the first at the start."""
    buttons = "".join(
        f'<button type="button" data-value="{value}" aria-pressed="{"false" if k else "true"}">{text(words)}</button>'
        for k, (value, words) in enumerate(choices.items())
    )
    return (
        f'<div class="toggle" id="{name}" role="group" aria-label="horizontal axis">{buttons}</div>'
    )


def embedded_json(name: str, values: Any) -> str:
    """Values for the script: no "<" in them, so that nothing in them ends the element."""
    content = json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{content}</script>'
