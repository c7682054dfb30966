"""Fail when a page of the built site loads anything from outside: ``python docs/check_site.py build/site``."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

#: Tags whose address a browser fetches by itself; an ``<a>`` is followed by people only.
_FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}
#: ``<link>`` kinds that name a page and fetch nothing.
_NAMES_ONLY = frozenset({"canonical", "next", "prev", "alternate"})


class _Fetches(HTMLParser):
    """Addresses outside of the site that a page fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an address with a host."""
        values = dict(attrs)
        address = values.get(_FETCHED.get(tag, "")) or ""
        if re.match(r"(?:[a-z]+:)?//", address) and values.get("rel") not in _NAMES_ONLY:
            self.outside.append(address)


def outside_of(site: Path) -> list[str]:
    """``file: address`` of everything that pages and style sheets load from outside."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser = _Fetches()
        parser.feed(page.read_text())
        found += [f"{page.relative_to(site)}: {address}" for address in parser.outside]
    for sheet in sorted(site.rglob("*.css")):
        loads = re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", sheet.read_text())
        found += [f"{sheet.relative_to(site)}: {address}" for address in loads]
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    loads = outside_of(site)
    if not (site / "index.html").exists() or loads:
        sys.exit("\n".join(loads) or f"{site} has no index.html")
