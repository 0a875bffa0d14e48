"""Reads a report's HTML back, so that tests look at what a browser is given."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"br", "hr", "img", "input", "meta"}


class Element:
    """An element with its attributes, its own text, and its children in order."""

    def __init__(self, name: str, attributes: dict[str, str | None]) -> None:
        self.name, self.attributes, self.children, self.parts = name, attributes, [], []

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    @property
    def text(self) -> str:
        """All text inside, in order."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def all(self, name: str = "", look: str = "") -> list[Element]:
        """Descendants of that name and class, in order."""
        found = []
        for child in self.children:
            if name in ("", child.name) and (not look or look in child.classes):
                found.append(child)
            found += child.all(name, look)
        return found

    def number(self, attribute: str) -> float:
        return float(self.attributes[attribute])


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, name, attributes):
        element = Element(name, dict(attributes))
        assert len(element.attributes) == len(attributes), f"<{name}> has an attribute twice"
        self.open[-1].children.append(element)
        self.open[-1].parts.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_endtag(self, name):
        assert self.open[-1].name == name, f"</{name}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].parts.append(data)


def read(html: str) -> Element:
    """The root of the tree. Fails unless every element is closed, in order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].name}> is never closed"
    return reader.open[0]


def assert_nothing_external(html: str) -> None:
    """No element loads or runs anything that is not in the page."""
    root = read(html)
    for element in root.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"<{element.name} {name}>"
            if name in ("src", "srcset", "data", "poster", "action", "xlink:href"):
                assert (value or "").startswith("data:image/"), f"<{element.name} {name}={value!r}>"
            if name == "href":
                assert element.name == "a" and value.startswith("#"), f"<{element.name} href={value!r}>"
    assert not root.all("link") and not root.all("iframe") and not root.all("base")
    for style in root.all("style"):
        assert "@import" not in style.text and "url(" not in style.text
