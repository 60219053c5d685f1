"""Render HTML pages that need no other file: style and script are inside, and nothing else may run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

LOADER = PackageLoader("srl_utils.evaluation.report")


def html_page(template: str, variables: Mapping[str, Any], loader: BaseLoader = LOADER) -> str:
    """Return an HTML page; all text except `Markup` is escaped.

    Args:
        template: its name. It gets `css` and `js`, and their hashes `css_hash` and `js_hash`, by which the page's policy
            allows only the report's own style and script.
        variables: what else the template gets.
        loader: finds the templates, those of the report among them.
    """
    page = environment(loader, autoescape=True)
    assets = {name: loader.get_source(page, f"report.{name}")[0] for name in ("css", "js")}
    hashes = {f"{name}_hash": _content_hash(text) for name, text in assets.items()}
    marked = {name: Markup(text) for name, text in assets.items()}
    return page.get_template(template).render({**variables, **marked, **hashes})


def environment(loader: BaseLoader = LOADER, **options: Any) -> Environment:
    """Return an environment that renders templates and refuses undefined variables."""
    return Environment(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def _content_hash(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
