"""The documents against the code: signatures, error messages, flags, links."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mimdit

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOLE = "…"


def literals(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Strings of a module; what is filled in when it runs is a hole."""
    inside = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else HOLE for v in node.values]
            yield node, "".join(map(str, parts))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield node, node.value


def sources() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in (ROOT / "mimdit").rglob("*.py")]


def listed() -> list[str]:
    """The messages of the troubleshooting page, with holes."""
    rows = (DOCS / "troubleshooting.md").read_text().splitlines()
    return [found[1] for row in rows if (found := re.match(r"\| `([^`]+)` \|", row))]


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, message.split(HOLE))), re.DOTALL)


def test_every_listed_message_occurs_in_the_code() -> None:
    texts = {text for tree in sources() for _, text in literals(tree)}
    messages = listed()
    assert len(messages) > 70 and len(set(messages)) == len(messages)
    missing = [m for m in messages if not any(pattern(m).fullmatch(text) for text in texts)]
    assert not missing


def test_every_sentence_for_a_user_is_listed() -> None:
    """Those of `PictureError` and `StopError`, and of the command line's argument parsers."""
    known, unlisted = [pattern(m) for m in listed()], []
    seen = 0
    for tree in sources():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name not in ("PictureError", "StopError", "ArgumentTypeError", "error"):
                continue
            for found, text in literals(node.args[0]):
                # Only a whole sentence, not one that passes another one on.
                if found is node.args[0] and len(text.replace(HOLE, "").strip(" :-;")) > 2:
                    seen += 1
                    if not any(p.fullmatch(text) for p in known):
                        unlisted.append(text)
    assert seen > 30 and not unlisted


def signatures() -> list[tuple[str, str]]:
    """(dotted name, arguments) of the calls in the interface page, on one line or several."""
    text = (DOCS / "api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: list[tuple[str, str]] = []
    for block in blocks:
        calls = re.findall(r"^([\w.]+)\((.*?)\)$", block, re.MULTILINE | re.DOTALL)
        assert len(calls) == len(re.findall(r"^\w", block, re.MULTILINE))
        found += calls
    return found


def defined(name: str) -> ast.FunctionDef:
    """The function or class of a dotted name, as the package writes it; of overloads the last."""
    first, *rest = name.split(".")
    found: list[Any] = [n for t in sources() for n in t.body if getattr(n, "name", "") == first]
    assert found, name
    for part in rest or (["__init__"] if isinstance(found[-1], ast.ClassDef) else []):
        found = [n for n in found[-1].body if getattr(n, "name", "") == part]
    assert isinstance(found[-1], ast.FunctionDef)
    return found[-1]


def parameters(made: ast.FunctionDef) -> list[tuple[str, str, str | None]]:
    """(kind, name, default) of each; the default as code, None where there is none."""
    a = made.args
    plain = [(x.arg, d) for x, d in zip(reversed(a.args), reversed(a.defaults), strict=False)][::-1]
    needed = [(x.arg, None) for x in a.args[: len(a.args) - len(plain)]]
    named = [(x.arg, d) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    kinds = [("plain", [*needed, *plain]), ("named", named)]
    kinds += [("rest", [(x.arg, None) for x in (a.vararg, a.kwarg) if x is not None])]
    found = [(kind, name, d and ast.unparse(d)) for kind, some in kinds for name, d in some]
    return [each for each in found if each[1] not in ("self", "cls")]


@pytest.mark.parametrize(("name", "arguments"), signatures(), ids=lambda x: x[:24])
def test_signatures_are_those_of_the_code(name: str, arguments: str) -> None:
    made = ast.parse(f"def f({arguments}): pass").body[0]
    assert isinstance(made, ast.FunctionDef)
    written, real = parameters(made), parameters(defined(name))
    # A long default is left out.
    filled = [
        r if len(w) == len(r) and w[2] == "..." and r[2] else w
        for w, r in zip(written, real, strict=False)
    ]
    assert filled + written[len(real) :] == real


def test_the_interface_page_has_all_that_the_package_offers() -> None:
    headings = set(re.findall(r"^## `(\w+)`", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert set(mimdit.__all__) <= headings
    assert headings - {"restore"} <= set(mimdit.__all__)


def flags(parser: Any) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_flags_in_the_documents_exist() -> None:
    from mimdit.cli.arguments import build_parser as restore_parser
    from mimdit.cli.demo import build_parser as demo_parser

    known = flags(restore_parser()) | flags(demo_parser()) | {"--head"}
    for name in ("quickstart", "how-it-works", "troubleshooting"):
        text = (DOCS / f"{name}.md").read_text()
        # Those in code, not the underlining of tables.
        used = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text))
        assert used and used <= known, (name, used - known)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
