import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mimdit.compare_page import (
    HEAD_BYTES,
    compare_page,
    index_page,
    is_index,
    page_entry,
)


class Reader(HTMLParser):
    """Elements with their attributes; raises where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None and uri.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    before = rng.integers(0, 256, (height, width, 3)).astype(np.float32) / 255
    return before, 1 - before


def test_small_pictures_are_kept_exactly() -> None:
    before, after = pair(30, 50)
    page = Reader(compare_page(before, after, "a.png"))
    for element, wanted in zip(page.all("img"), (before, after), strict=True):
        assert np.array_equal(np.asarray(decoded(element["src"])), np.rint(wanted * 255))


def test_nothing_is_fetched_and_keyboards_reach_everything() -> None:
    text = compare_page(*pair(30, 50), "a.png", ["seed 0"], chart=b"png", index="compare.html")
    page = Reader(text)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            if name in attributes:
                value = attributes[name] or ""
                assert value.startswith("data:image/") or value == "./compare.html"
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert "url(" not in text and "@import" not in text
    policy = page.all("meta")[2]["content"] or ""
    assert policy.startswith("default-src 'none'") and "connect" not in policy
    (slider,) = page.all("input")
    assert slider["type"] == "range" and slider["aria-label"] and "tabindex" not in slider
    assert all(image["alt"] for image in page.all("img"))
    assert "prefers-color-scheme: dark" in text and "pointerdown" in text
    assert "touch-action" in text and "seed 0" in text


def test_large_pictures_are_shown_smaller_and_say_so() -> None:
    before, after = pair(8, 5000)
    text = compare_page(before, after, "a.png")
    assert "5000×8 pixels, shown at 4096×7" in text
    assert decoded(Reader(text).all("img")[0]["src"]).size == (4096, 7)
    before, after = pair(1100, 1000)
    page = Reader(compare_page(before, after, "a.png"))
    shown = decoded(page.all("img")[1]["src"])
    assert shown.format == "JPEG" and shown.size == (1000, 1100)


def test_colour_profiles_that_fit_are_kept() -> None:
    profile = b"\0" * 16 + b"RGB " + b"\0" * 108
    for icc, kept in ((profile, profile), (profile.replace(b"RGB ", b"CMYK"), None)):
        page = Reader(compare_page(*pair(9, 9), "a.png", icc=icc))
        assert decoded(page.all("img")[0]["src"]).info.get("icc_profile") == kept


def test_titles_cannot_break_out() -> None:
    title = '</title><script>alert(1)</script>"\n\udcff.png'
    text = compare_page(*pair(9, 9), title, [title], index='a"b?.html')
    page = Reader(text)
    assert len(page.all("script")) == 1 and '"./a%22b%3F.html"' in text
    entry = page_entry(text.encode()[:HEAD_BYTES])
    assert entry is not None and entry[0] == title.replace("\n", "\\n").replace("\udcff", "\\udcff")
    listing = index_page([(title, title, entry[1])])
    assert not Reader(listing).all("script") and is_index(listing.encode())


def test_lists_find_their_small_pictures_again() -> None:
    noise = np.random.default_rng(1).random((900, 900, 3), np.float32)
    text = compare_page(noise, 1 - noise, "noise.png")
    entry = page_entry(text.encode()[:HEAD_BYTES])
    assert entry is not None and entry[0] == "noise.png"
    small = np.asarray(decoded(entry[1]))
    assert small.shape == (320, 320, 3)
    assert page_entry(b"<title>x</title>") is None and not is_index(text.encode())


def test_the_small_picture_is_half_before_and_half_after() -> None:
    before = np.zeros((40, 60, 3), np.float32)
    text = compare_page(before, before + 0.5, "a.png")
    entry = page_entry(text.encode())
    assert entry is not None
    small = np.asarray(decoded(entry[1])).astype(int)
    assert abs(small[20, 5] - 0).max() < 10 and abs(small[20, 55] - 128).max() < 10


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="after: expected shape"):
        compare_page(pair(8, 9)[0], pair(8, 8)[0], "a")


def test_style_and_script_have_no_unbalanced_braces() -> None:
    text = compare_page(*pair(8, 8), "a")
    for kind in ("style", "script"):
        (body,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert body.count("{") == body.count("}") > 5
