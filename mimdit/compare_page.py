"""Before/after pages: one HTML file with a slider for each picture, and a list of many.

They need nothing besides themselves: pictures are data URIs, and a content policy forbids the
browser to fetch anything.
"""

import base64
import html
import io
import re
from collections.abc import Sequence
from urllib.parse import quote

import numpy as np
from PIL import Image

# Pictures are shown with at most this many pixels a side; below so many in all without loss.
_SIDE, _EXACT = 4096, 2**20
# Smaller pictures are enlarged to this many pixels of the screen, four times at most.
_SEEN = 720
# Pixels a side of the small picture in lists.
_THUMBNAIL = 320
# Bytes from the start of a page that hold its title and its small picture.
HEAD_BYTES = 2**18
_MARK = '<meta name="generator" content="mimdit">'
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
_ICON = re.compile(r'<link rel="icon" href="(data:image/jpeg;base64,[A-Za-z0-9+/=]+)">')
_TITLE = re.compile(r"<title>(.*?) · before and after</title>", re.DOTALL)

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #656d76;
  --line: #d1d9e0; --soft: #f3f5f7; --accent: #0b63c5; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1215; --ink: #e6e9ec; --faint: #9aa3ad;
  --line: #333b44; --soft: #1a1f24; --accent: #6cb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 110rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
p { margin: .25rem 0 0; color: var(--faint); }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
"""

_PAGE_STYLE = """
header { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: end;
  justify-content: space-between; margin-bottom: 1rem; }
button { font: inherit; padding: .35rem .9rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--soft); color: var(--ink); cursor: pointer; }
.frame { overflow: auto; border-radius: .5rem; background: var(--soft); text-align: center; }
.compare { --at: 50%; position: relative; display: inline-block; vertical-align: top;
  max-width: 100%; line-height: 0; touch-action: pan-y pinch-zoom; cursor: ew-resize;
  user-select: none; -webkit-user-select: none; }
.compare img { display: block; width: auto; height: auto; max-width: 100%; max-height: 82vh;
  -webkit-user-drag: none; pointer-events: none; }
.compare.small img { width: 100%; max-height: none; }
.compare.full { max-width: none; width: auto !important; touch-action: pan-x pan-y pinch-zoom; }
.compare.full .before { max-width: none; max-height: none; width: auto; }
.compare .after { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
.compare .after img { width: 100%; height: 100%; max-height: none; }
.divider { position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / .35); pointer-events: none; }
.divider::after { content: "\\2039\\00a0\\203a"; position: absolute; top: 50%; left: 50%;
  width: 2.75rem; height: 2.75rem; transform: translate(-50%, -50%); border-radius: 50%;
  background: #fff; color: #1f2328; font: 600 1.25rem/2.6rem system-ui, sans-serif;
  text-align: center; box-shadow: 0 1px 6px rgb(0 0 0 / .45); }
.compare input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  pointer-events: none; }
.compare:has(input:focus-visible) { outline: 3px solid var(--accent); outline-offset: -3px; }
.tag { position: absolute; top: .75rem; padding: .15rem .6rem; border-radius: 1rem;
  background: rgb(0 0 0 / .6); color: #fff; font-size: .85rem; line-height: 1.4;
  pointer-events: none; }
.tag.left { left: .75rem; } .tag.right { right: .75rem; }
details { margin-top: 1rem; } summary { cursor: pointer; }
details img { max-width: 100%; height: auto; margin-top: .75rem; border-radius: .5rem;
  width: 50rem; }
"""

_SCRIPT = """
const box = document.querySelector(".compare"), range = box.querySelector("input");
const frame = document.querySelector(".frame"), zoom = document.querySelector("button");
const [left, right] = box.querySelectorAll(".tag");
function show() {
  box.style.setProperty("--at", range.value + "%");
  range.setAttribute("aria-valuetext", Math.round(range.value) + " % before");
  left.style.opacity = range.value < 8 ? 0 : 1;
  right.style.opacity = range.value > 92 ? 0 : 1;
}
function follow(event) {
  const area = box.getBoundingClientRect();
  range.value = 100 * (event.clientX - area.left) / area.width;
  show();
}
box.addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  box.setPointerCapture(event.pointerId);
  range.focus({ preventScroll: true });
  follow(event);
});
box.addEventListener("pointermove", event => {
  if (box.hasPointerCapture(event.pointerId)) follow(event);
});
range.addEventListener("input", show);
zoom.addEventListener("click", () => {
  const full = box.classList.toggle("full");
  zoom.textContent = full ? "Fit" : "100 %";
  if (full) frame.scrollLeft = (frame.scrollWidth - frame.clientWidth) / 2;
});
show();
"""

_INDEX_STYLE = """
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.25rem;
  margin: 1.25rem 0 0; padding: 0; list-style: none; }
li a { display: block; color: inherit; text-decoration: none; }
li img { display: block; width: 100%; aspect-ratio: 4 / 3; object-fit: cover; border-radius: .5rem;
  background: var(--soft); }
li span { display: block; margin-top: .4rem; font-size: .9rem; overflow-wrap: anywhere; }
li a:hover span { text-decoration: underline; }
"""


def compare_page(
    before: np.ndarray,
    after: np.ndarray,
    title: str,
    facts: Sequence[str] = (),
    icc: bytes | None = None,
    chart: bytes | None = None,
    index: str | None = None,
) -> str:
    """A page that shows two pictures over each other, with a slider between them.

    The slider follows mouse, touch and arrow keys. Small pictures are kept exactly, large ones as
    JPEG, of at most 4096 pixels a side.

    Args:
        before, after: float [H, W, 3] in [0, 1].
        title: the picture's name. facts: what is said under it, in short pieces.
        icc: the colour profile of both. chart: a PNG file of the experts.
        index: where the list of all pages is, as a relative link.

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"after: expected shape {before.shape}, got {after.shape}")
    height, width = before.shape[:2]
    images = [shrunk(pixels, _SIDE) for pixels in (before, after)]
    shown = images[0].size
    size = f"{width}×{height} pixels"
    if shown != (width, height):
        size += f", shown at {shown[0]}×{shown[1]}"
    sources = [_uri(*encoded(image, icc)) for image in images]
    icon = _uri(_jpeg(_halves(*images), None, 80), "jpeg")
    name = html.escape(_readable(title))
    # Small pictures are enlarged, so that there is something to see.
    zoom = min(_SEEN / max(shown), 4)
    small = f' small" style="width: min(100%, {round(shown[0] * zoom)}px)' if zoom > 1 else ""
    back = f'<p><a href="{_link(index)}">All pictures</a></p>' if index else ""
    experts = ""
    if chart is not None:
        experts = (
            "<details><summary>Which experts restored it</summary>"
            f'<img src="{_uri(chart, "png")}" alt="Weights of the experts, block by block; '
            'the JSON file of the report has the figures."></details>'
        )
    box = f'width="{shown[0]}" height="{shown[1]}"'
    return f"""{_head(f"{name} · before and after", icon, _STYLE + _PAGE_STYLE)}
<body>
<header><div>{back}<h1>{name}</h1>
<p>{html.escape(" · ".join([size, *map(_readable, facts)]))}</p></div>
<button type="button">100 %</button></header>
<main><div class="frame"><div class="compare{small}">
<img class="before" src="{sources[0]}" {box} alt="{name}, before">
<div class="after"><img src="{sources[1]}" {box} alt="{name}, after"></div>
<div class="divider"></div>
<span class="tag left" aria-hidden="true">before</span>
<span class="tag right" aria-hidden="true">after</span>
<input type="range" min="0" max="100" step="any" value="50" aria-label="How much is shown before">
</div></div>
<p>Drag across the picture, or use the arrow keys.</p>
{experts}</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def index_page(entries: Sequence[tuple[str, str, str]]) -> str:
    """A page that lists pages: of each its relative path, its title and a small picture's URI."""
    items = "\n".join(
        f'<li><a href="{_link(path)}"><img loading="lazy" src="{icon}" alt="">'
        f"<span>{html.escape(_readable(title))}</span></a></li>"
        for path, title, icon in entries
    )
    count = f"{len(entries)} picture{'' if len(entries) == 1 else 's'}"
    return f"""{_head("Before and after", None, _STYLE + _INDEX_STYLE)}
<body>
<h1>Before and after</h1>
<p>{count}, each half before and half after. Open one to compare.</p>
<main><ul>
{items}
</ul></main>
</body>
</html>
"""


def page_entry(start: bytes) -> tuple[str, str] | None:
    """Title and small picture of a page, from its first `HEAD_BYTES`; None of other files."""
    text = start.decode("utf-8", "replace")
    title, icon = _TITLE.search(text), _ICON.search(text)
    if _MARK not in text or title is None or icon is None:
        return None
    return html.unescape(title[1]), icon[1]


def is_index(start: bytes) -> bool:
    """Whether a file is a list of this module, and may be replaced by a newer one."""
    text = start.decode("utf-8", "replace")
    return _MARK in text and "<title>Before and after</title>" in text


def _head(title: str, icon: str | None, style: str) -> str:
    link = f'<link rel="icon" href="{icon}">\n' if icon else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{_MARK}
{_POLICY}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
{link}<style>{style}</style>
</head>"""


def _readable(text: str) -> str:
    """Names hold any bytes; pages hold Unicode, on one line."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _link(path: str) -> str:
    """A relative path as a link; a name that begins like a scheme stays a name."""
    return html.escape("./" + quote(path.encode("utf-8", "surrogateescape")))


def shrunk(pixels: np.ndarray, side: int) -> Image.Image:
    """Float [H,W,3] in [0,1] as 8 bits, of at most `side` pixels a side."""
    whole = np.empty(pixels.shape, np.uint8)
    # Some rows at a time: large pictures fill memory as it is.
    for row in range(0, len(pixels), 256):
        part = slice(row, row + 256)
        whole[part] = np.rint(pixels[part].clip(0, 1) * 255)
    image = Image.fromarray(whole)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3)
    return image


def _halves(before: Image.Image, after: Image.Image) -> Image.Image:
    """A small picture, left half before and right half after, a white line between."""
    small = before.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    width, height = small.size
    right = after.resize(small.size, reducing_gap=2).crop((width // 2, 0, width, height))
    small.paste(right, (width // 2, 0))
    small.paste((255, 255, 255), (width // 2, 0, min(width // 2 + 2, width), height))
    return small


def encoded(image: Image.Image, icc: bytes | None) -> tuple[bytes, str]:
    """A file of the picture and its kind: exact where it is small, else a good JPEG.

    icc: the colour profile of the file it came from.
    """
    # A profile of gray or CMYK does not describe these pixels.
    icc = icc if icc is not None and icc[16:20] == b"RGB " else None
    if image.width * image.height > _EXACT:
        return _jpeg(image, icc, 92), "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=icc)
    return buffer.getvalue(), "png"


def _jpeg(image: Image.Image, icc: bytes | None, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0, icc_profile=icc)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
