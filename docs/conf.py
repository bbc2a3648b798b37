"""Settings of the documentation site. `make docs` builds it from the pages of this folder."""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import poise

DOCS = Path(__file__).parent

project = "Poise"
author = "The Poise authors"
version = release = poise.__version__
html_title = f"Poise {release}"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
templates_path: list[str] = []
exclude_patterns = ["_build", "jupyter_execute"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"  # a page is executed again only if its code has changed
nb_execution_timeout = 900
nb_execution_in_temp = True  # pages write runs
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
highlight_language = "text"  # of blocks without a language, which are commands and trees

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"  # of names in backticks; `without_markup` makes links of those of poise


# In formulas and names: *x, |x - x^|, and name_ at the end of a word.
MARKUP = re.compile(r"\*(?=[\w(])(?!\w+\*)|\|(?=\S)|(?<=\w)_(?=[\s,.;)]|$)")


def without_markup(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Escape what reStructuredText would read as markup in formulas, and link names of poise."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...", "*")):
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
            parts[1::2] = [re.sub(r"^(?=`poise\.)", ":py:obj:", part) for part in parts[1::2]]
            lines[number] = "".join(parts)


def without_links_to_folders(app: Any, name: str, source: list[str]) -> None:
    """Turn links to folders outside of docs/ into text: the site does not have them."""

    def replace(link: re.Match[str]) -> str:
        target = (DOCS / name).parent / link[2]
        return f"`{link[1]}`" if target.is_dir() else link[0]

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]*)\)", replace, source[0])


def inline_math(self: Any, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_math(self: Any, node: nodes.math_block) -> None:
    formula = tex2mathml(node.astext(), as_block=True)
    self.body.append(f'<div class="math" style="overflow-x: auto">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    # MathML needs no script of a network, and all browsers show it.
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-docstring", without_markup, priority=100)
    app.connect("source-read", without_links_to_folders)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


html_math_renderer = "mathml"
