"""The colours of a page's texts, as a browser would find them, for pages with simple styles.

Known are selectors of tags, classes and ids with descendants and children, ``:checked`` radio
buttons by ``:has``, CSS variables, ``color-mix`` in sRGB and ``prefers-color-scheme``.  What needs
a pointer (``:hover``, ``:focus``) counts as shown.
"""

import html.parser
import re
from dataclasses import dataclass, field

VOID = frozenset({"meta", "br", "input"})
Rgb = tuple[float, float, float]


@dataclass
class Element:
    """One element: its tag, attributes, parent, own texts and children."""

    tag: str
    attributes: dict[str, str]
    parent: "Element | None"
    texts: list[str] = field(default_factory=list)
    children: list["Element"] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def all(self, tag: str = "") -> list["Element"]:
        """Return this element and those below it, of one tag if one is given."""
        own = [self] if tag in ("", self.tag) else []
        return own + [found for child in self.children for found in child.all(tag)]

    @property
    def text(self) -> str:
        return "".join(self.texts) + "".join(child.text for child in self.children)


class _Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("root", {}, None)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        element = Element(tag, given, self.at)
        self.at.children.append(element)
        self.at = self.at if tag in VOID else element

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"<{self.at.tag}> is closed by </{tag}>"
        self.at = self.at.parent or self.root

    def handle_data(self, data: str) -> None:
        self.at.texts.append(data)


def parsed(page: str) -> Element:
    """Return the tree of a page, all of whose elements must be closed."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.at is parser.root, f"<{parser.at.tag}> is not closed"
    return parser.root


def contrast(one: Rgb, other: Rgb) -> float:
    """Return WCAG's contrast ratio of two sRGB colours in 0 to 255."""

    def luminance(colour: Rgb) -> float:
        shares = [level / 255 for level in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


class Colours:
    """The styles of a page for one colour scheme and one checked radio button."""

    def __init__(self, page: str, *, dark: bool, checked: str = "") -> None:
        self.root, self.checked = parsed(page), checked
        css = "".join(element.text for element in self.root.all("style"))
        scheme = r"@media \(prefers-color-scheme:dark\){((?:[^{}]|{[^}]*})*)}"
        css = re.sub(scheme, r"\1" if dark else "", css)
        self.rules: list[tuple[int, list[str], dict[str, str]]] = []
        for selectors, body in re.findall(r"([^{}]+){([^{}]*)}", css):
            for selector in re.split(r",(?![^(]*\))", selectors):
                parts = re.findall(r">|[^\s>]+", selector)
                rank = 100 * selector.count("#") + 10 * len(re.findall(r"[.:]\w", selector))
                rank += sum(bool(re.match(r"\w", part)) for part in parts)
                self.rules.append((rank, parts, _declarations(body)))
        self.rules.sort(key=lambda rule: rule[0])  # later ones win among equals
        self._styles: dict[int, dict[str, str]] = {}

    def style(self, element: Element) -> dict[str, str]:
        """Return an element's own and inherited declarations."""
        if id(element) not in self._styles:
            above = {} if element.parent is None else self.style(element.parent)
            style = {k: v for k, v in above.items() if k.startswith("--") or k in ("color", "fill")}
            for _, parts, declarations in self.rules:
                if self._matches(element, parts):
                    style |= declarations
            style |= _declarations(element.attributes.get("style", ""))
            if "color" in style:  # variables are resolved where they are used
                style["color"] = self._resolved(style["color"], style)
            self._styles[id(element)] = style
        return self._styles[id(element)]

    def pairs(self) -> dict[tuple[Rgb, Rgb], str]:
        """Return the colours of every text and of what is behind it, with one such text."""
        found = {}
        for element in self.root.all("body")[0].all():
            if any(text.strip() for text in element.texts):
                style = self.style(element)
                ink = style["fill"] if element.tag == "text" else style["color"]
                pair = (self.colour(ink, style), self.background(element))
                found.setdefault(pair, f"<{element.tag}> {element.text[:40]}")
        return found

    def background(self, element: Element) -> Rgb:
        """Return the colour behind an element's text."""
        while True:
            style = self.style(element)
            if text := self._resolved(style.get("background", ""), style):
                return self.colour(text, style)
            assert element.parent is not None, "the page has no background"
            element = element.parent

    def colour(self, text: str, style: dict[str, str]) -> Rgb:
        """Return the colour that a declaration names."""
        text = self._resolved(text, style)
        if text.startswith("#"):
            digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
            return tuple(int(digits[n : n + 2], 16) for n in (0, 2, 4))  # type: ignore[return-value]
        mixed = re.fullmatch(r"color-mix\(in srgb,(\S+) ([\d.]+)%,(\S+)\)", text)
        assert mixed is not None, f"no colour that is known here: {text}"
        full, share, paper = self.colour(mixed[1], style), float(mixed[2]) / 100, mixed[3]
        behind = self.colour(paper, style)
        return tuple(p + share * (f - p) for f, p in zip(full, behind))  # type: ignore[return-value]

    def _resolved(self, text: str, style: dict[str, str]) -> str:
        """Put in the variables; nothing is left if one is not defined, as in browsers."""
        while found := re.search(r"var\((--\w+)\)", text):
            if found[1] not in style:
                return ""
            text = text.replace(found[0], style[found[1]])
        return text

    def _matches(self, element: Element, parts: list[str]) -> bool:
        *before, last = parts
        if not self._fits(element, last):
            return False
        if not before:
            return True
        ancestors = []
        while element.parent is not None:
            element = element.parent
            ancestors.append(element)
        if before[-1] == ">":
            return self._matches(ancestors[0], before[:-1])
        return any(self._matches(ancestor, before) for ancestor in ancestors)

    def _fits(self, element: Element, simple: str) -> bool:
        chosen = re.search(r":has\(#([\w-]+):checked\)", simple)
        if chosen is not None and chosen[1] != self.checked:
            return False
        simple = re.sub(r":has\([^)]*\)|:hover|:focus", "", simple)
        simple = simple.replace(":root", "html")
        tag = re.match(r"\w+", simple)
        if tag is not None and tag[0] != element.tag:
            return False
        return all(name in element.classes for name in re.findall(r"\.([\w-]+)", simple))


def _declarations(body: str) -> dict[str, str]:
    pairs = (entry.partition(":") for entry in body.split(";") if ":" in entry)
    return {name.strip(): value.strip() for name, _, value in pairs}
