"""Sphinx reads this. `prep.py` lays the source out first; `make docs` calls both."""

import ast
import configparser
import inspect
import re
import textwrap
from pathlib import Path

settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
settings.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")

project = "archrepair"
author = settings["DEFAULT"]["author"]
release = version = settings["DEFAULT"]["version"]
project_copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_design", "sphinx_copybutton"]
exclude_patterns = ["jupyter_execute", "_figures"]

# Notebooks: what is stored is what is shown; nothing is run.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # outputs may be tables
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header",  # lessons may skip a level of headings
                     "ref.python"]  # the words in an annotation's range are not names, though some are called like them

# Modules: signatures, types and docstrings.
autodoc_member_order = "bysource"
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}  # else it is printed as the union it stands for
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_preserve_defaults = True
add_module_names = False
maximum_signature_line_length = 88

# No page asks for anything from another host.
mathjax_path = "tex-svg.js"
html_theme = "furo"
html_title = f"archrepair {version}"
html_static_path = ["_static", "workflow.svg"]
html_favicon = "_static/favicon.svg"
html_css_files = ["custom.css"]
html_js_files = ["keyboard.js", "sort.js"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5d8f", "color-brand-content": "#0b5d8f", "color-api-name": "#0b5d8f"},
    "dark_css_variables": {"color-brand-primary": "#7cc4f0", "color-brand-content": "#7cc4f0", "color-api-name": "#7cc4f0"},
}
copybutton_exclude = ".linenos, .gp, .go"


def docstring(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings speak Markdown's `code`; Sphinx expects two backticks, and takes stars and bars outside code for markup.

    Comments behind the parameters of a function become a list below its docstring.
    """
    if what in ("function", "method"):
        lines[:] = [*lines, *(f":param {parameter}: {comment}" for parameter, comment in comments_of(obj).items()), ""]
    parts = re.split(r"(`+[^`]+`+)", "\n".join(lines))
    spoken = [f"``{p.strip('`')}``" if p.startswith("`") else re.sub(r"([*|\\])|_(?=\W|$)", lambda m: "\\" + m.group(), p) for p in parts]
    lines[:] = _spaced(spoken)


def comments_of(function: object) -> dict[str, str]:
    "What stands behind each parameter that has a line of its own."
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        arguments = ast.parse(source).body[0].args
    except (TypeError, OSError, AttributeError):  # not a function, or none with a source
        return {}
    lines = source.splitlines()
    found = {argument.arg: re.search(r"  # (.+)$", lines[argument.end_lineno - 1][argument.end_col_offset:])
             for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *filter(None, [arguments.kwarg]))}
    return {name: match[1] for name, match in found.items() if match}


def _spaced(parts: list[str]) -> list[str]:
    "Code that touches a letter needs an invisible space in reStructuredText."
    text = ""
    for i, part in enumerate(parts):
        if part.startswith("``"):
            before = "" if not text or text[-1] in " \n([{'\"-/:" else "\\ "
            after = parts[i + 1][:1] if i + 1 < len(parts) else ""
            part = before + part + ("\\ " if after.isalnum() else "")
        text += part
    return text.split("\n")


def setup(app) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
