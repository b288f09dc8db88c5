"""The import arrows between packages and inside `mimdit`."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "mimkernels": set(),
    "mimdit": {"mimkernels"},
    "export": {"mimkernels", "mimdit"},
    "training": {"mimkernels", "mimdit"},
    "bench": {"mimkernels", "mimdit", "export", "training"},
}
# Lower layers first; a module imports only from layers before its own.
LAYERS = [
    "experts tiling options",
    "mim tile_loop",
    "condition flow attention steering memory",
    "transformer",
    "vetting",
    "codec",
    "tiled_codec",
    "presets text",
    "sampling engine",
    "planning",
    "pipeline",
    "loading",
    "sd35",
    "restoration",
    "cli",
]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_packages_import_one_way() -> None:
    for package, allowed in ALLOWED.items():
        for path in (ROOT / package).rglob("*.py"):
            roots = {name.split(".")[0] for name in imported(path)}
            assert roots & (set(ALLOWED) | {"tests"}) <= allowed | {package}, path


def test_modules_of_mimdit_import_downwards() -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer.split()}
    for path in (ROOT / "mimdit").rglob("*.py"):
        own = rank.get(path.relative_to(ROOT / "mimdit").parts[0].removesuffix(".py"))
        if own is None:
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "mimdit" and len(parts) > 1 and parts[1] in rank:
                assert rank[parts[1]] <= own, f"{path} imports {name}"


def test_files_stay_readable() -> None:
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 350, path
