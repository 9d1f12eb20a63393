"""HTML that cannot forget to escape: text becomes markup only through `tag`, which escapes what is not markup yet."""

from html import escape


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """An element; plain strings in it are escaped, None is left out; `class_` and `data_value` are named as in HTML."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{escape(str(value))}"' for key, value in given.items())
    inner = join(*children)
    return Markup(f"<{name}{opening}>{inner}</{name}>") if name not in VOID else Markup(f"<{name}{opening}>")


def join(*children: str | None) -> Markup:
    """Markup side by side; plain strings are escaped, None is left out."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))


VOID = {"img", "source", "meta", "link"}
