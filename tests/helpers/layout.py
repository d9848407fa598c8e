"""Read the imports of the project and report those that break its layout.

A module may import from its own room and from the rooms before it in `ROOMS`. No two modules import each other, not
even through others. Imports of the project's modules stand at the top of a file.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# From the lowest to the highest. A name is a module, or a package with all its modules.
ROOMS: list[tuple[str, ...]] = [
    (
        "util.interrupts",
        "util.memory",
        "util.notes",
        "util.errors",
        "util.architectures",
        "util.pos_embed",
        "util.lr_sched",
        "util.lr_decay",
        "util.lars",
        "util.crop",
        "util.config",
        "util.parser",
        "util.console",
    ),
    ("util.compute",),
    ("util.parallel",),
    ("util.weights",),
    ("util.checkpoint",),
    ("util.data",),
    ("util.report",),
    ("util.training",),
    ("util.speed_flags", "util.arguments", "util.datasets", "util.misc", "util.next_commands"),
    ("planning",),
    (
        "models_encoder",
        "models_mae",
        "models_vit",
        "models_timm",
        "models_grid",
        "models_segment",
        "models_detect",
        "models_lit",
    ),
    ("methods",),
    ("evaluation",),
    ("engine_pretrain", "engine_finetune", "engine_dense"),
    ("main_pretrain", "main_finetune", "main_linprobe", "main_segment", "main_detect", "main_lit"),
    (
        "submitit_pretrain",
        "submitit_finetune",
        "submitit_linprobe",
        "submitit_segment",
        "submitit_detect",
        "submitit_lit",
    ),
]
TOOLS = "tools"  # may import everything but mains, engines and each other


@dataclass(frozen=True)
class Import:
    """An import of one module of the project by another."""

    importer: str
    line: int
    imported: str
    late: bool  # inside a function


def modules(root: Path) -> dict[str, str]:
    """Source texts of the project's modules by dotted name."""
    sources = {}
    packages = {name.split(".")[0] for room in ROOMS for name in room} | {TOOLS}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in packages:
            sources[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


def imports(sources: dict[str, str]) -> Iterator[Import]:
    """Every import among `sources`."""
    for importer, text in sources.items():
        tree = ast.parse(text)
        top = set(tree.body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                named = {name if name in sources else node.module for name in full}
            elif isinstance(node, ast.Import):
                named = {alias.name for alias in node.names}
            else:
                continue
            for imported in sorted(named & sources.keys() - {importer}):
                yield Import(importer, node.lineno, imported, node not in top)


def room_of(module: str) -> int | None:
    """Return the index of its room in `ROOMS`, None for a tool and for an empty package such as `util`."""
    for number, names in enumerate(ROOMS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    return None


def faults(sources: dict[str, str]) -> list[str]:
    """Return a sentence for each import that breaks the layout."""
    all_imports = list(imports(sources))
    wrong = []
    homeless = {m for m in sources if room_of(m) is None and m.split(".")[0] != TOOLS and sources[m].strip()}
    wrong += [f"{module} is in no room: add it to ROOMS" for module in sorted(homeless)]
    for each in all_imports:
        at = f"{each.importer.replace('.', '/')}.py:{each.line}"
        here, there = room_of(each.importer), room_of(each.imported)
        if here is not None and (there is None or there > here):
            wrong.append(f"{at} imports {each.imported}, which is in a room above")
        if here is None and each.importer.startswith(f"{TOOLS}."):
            if there is not None and there > room_of("evaluation"):
                wrong.append(f"{at}: a tool imports {each.imported}; tools build on what lies below the engines")
            if each.imported.startswith(f"{TOOLS}."):
                wrong.append(f"{at}: a tool imports the tool {each.imported}; what they share belongs into evaluation/")
        if each.late:
            wrong.append(f"{at} imports {each.imported} inside a function: move it to the top of the file")
    return wrong + [f"{' imports '.join(circle)}: a circle" for circle in circles(all_imports)]


def circles(all_imports: list[Import]) -> list[list[str]]:
    """Return the circles of modules that import each other, each once."""
    graph: dict[str, set[str]] = {}
    for each in all_imports:
        graph.setdefault(each.importer, set()).add(each.imported)
    found_circles, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found_circles.append([*path[path.index(module) :], module])
        elif module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found_circles
