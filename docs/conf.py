"""Sphinx configuration of the manual; `tox -e docs` builds it."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

from sphinx.ext.autodoc.preserve_defaults import update_defvalue
from sphinx.util import inspect as sphinx_inspect
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

import layeredrl_torchrl

project = "layeredrl_torchrl"
author = "layeredrl_torchrl developers"
copyright = f"2026, {author}"
release = version = layeredrl_torchrl.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
pygments_style = "default"  # furo's own does not tell removed lines from added ones
html_title = f"{project} {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# With -n every reference has to lead somewhere, but for those to other packages and to what is
# described by comments only: the manual is built without a network.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(abc|collections|dataclasses|gymnasium|numpy|pathlib|tensordict|torch|torchrl)\..*",
    ),
    (r"py:exc", r"CheckpointError"),  # of TorchRL
    # In the fields of tuples and in the types of options.
    (r"py:(class|data)", r"Count|HOST|Natural|Number|Path|Positive|Seed|Share|Tensor|inf"),
    (r"py:class", r"Figure|TensorDictBase"),  # where the figure's type is not imported
    (r"py:attr", r".*"),
    (r"py:class", r"inf|pathlib\.Path"),
    (r"py:exc", r"CheckpointError"),  # TorchRL's
]


def _import(name: str) -> Any:
    """What can be imported by a dotted name, or ``None``."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part)
        except (ImportError, AttributeError):
            continue
        return found
    return None


def _resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Lead references by any importable name to where the object is documented.

    That is below its sub-package; docstrings also use the flat name, that of the file, names that
    their file imports, and those of inherited members. What exists but is not part of the reference
    becomes plain text; what does not exist is left to be warned about.
    """
    if node.get("refdomain") != "py":
        return None
    target, module, cls = node["reftarget"], node.get("py:module"), node.get("py:class")
    files = [name for name in sys.modules if name.startswith("layeredrl_torchrl")]
    found = next(
        (
            found
            for scope in (f"{module}.{cls}.", f"{module}.", "", *(f"{file}." for file in files))
            if (found := _import(scope + target)) is not None
        ),
        None,
    )
    path = (getattr(found, "__module__", None) or "").split(".")
    objects = env.get_domain("py").objects
    names = [
        ".".join([*path[:cut], getattr(found, "__qualname__", target)])
        for cut in range(len(path), 0, -1)
    ]
    if isinstance(found, (int, str, tuple)):  # data, which does not know where it is from
        names = [name for name in objects if name.endswith(f".{target}")]
    elif path[0] != "layeredrl_torchrl":
        return None
    for name in names:
        if name in objects:
            known = objects[name]
            return make_refnode(
                app.builder, node["refdoc"], known.docname, known.node_id, contnode, name
            )
    return contnode


def _signature(app: Any, what: str, name: str, found: Any, *_: Any) -> tuple[str, None] | None:
    """Show a class's own arguments, where a metaclass of TorchRL or tensordict hides them."""
    init = getattr(found, "__init__", None)
    if what != "class" or not inspect.isfunction(init):
        return None
    if not hasattr(init, "__signature__"):  # else its defaults are written elsewhere
        update_defvalue(app, init, bound_method=True)
    signature = sphinx_inspect.signature(init, bound_method=True)
    text = stringify_signature(signature, show_return_annotation=False, unqualified_typehints=True)
    return text, None


def setup(app: Any) -> None:
    app.connect("missing-reference", _resolve)
    app.connect("autodoc-process-signature", _signature)
