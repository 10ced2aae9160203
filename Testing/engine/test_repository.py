"""The rules of the house: layers, safe loading, packaging lists, file sizes and working links."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

import progidiff

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "ProGiDiffSlicer"
ENGINE = MODULE / "progidiff"
PANEL = MODULE / "ProGiDiffSlicerLib"
LABORATORY = ROOT / "experiments"
MAX_FILE_BYTES = 20_000_000

SLICER_SIDE = {"slicer", "qt", "ctk", "vtk", "vtkmodules", "PythonQt"}
# What the module inside Slicer imports of the engine; it must load without torch or anything else that Slicer does not have.
SHARED = (
    "progidiff.cards",
    "progidiff.curation",
    "progidiff.errors",
    "progidiff.outputs.segmentation",
    "progidiff.places",
    "progidiff.proposals",
    "progidiff.system",
    "progidiff.targets",
    "progidiff.volumes.geometry",
    "progidiff.volumes.slicing",
    "progidiff.volumes.values",
    "progidiff.wire",
)
IN_SLICER = {"numpy", "SimpleITK"}
# What one of them uses where it is there.
WHERE_THERE = {"system.py": {"psutil"}, "segmentation.py": {"nibabel"}}
# Parents of shared modules: their __init__ holds no imports.
PARENTS = {"progidiff", "progidiff.outputs", "progidiff.volumes"}
UNSAFE_MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "pickle", "shelve"}


def _update_cmake_lists() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_cmake_lists", ROOT / "Utilities/update_cmake_lists.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _repository_files() -> list[Path]:
    """Files that are, or would be, committed; without git (a source archive) all outside build folders."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, check=True, capture_output=True).stdout.decode().split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    skipped = {".venv", "build", "dist", "demo-output", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in skipped]
        files += [Path(folder, name) for name in names]
    return files


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _walk_executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not _is_type_checking(child):
            yield child
            yield from _walk_executed(child)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of all modules that a file imports, at any depth, with their lines."""
    package = path.relative_to(MODULE if path.is_relative_to(MODULE) else ROOT).parent.parts
    for node in _walk_executed(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module, node.lineno
            # `from progidiff import client` names a module, not a value.
            if (MODULE / module.replace(".", "/")).is_dir():
                yield from (
                    (f"{module}.{alias.name}", node.lineno)
                    for alias in node.names
                    if (MODULE / module.replace(".", "/") / f"{alias.name}.py").is_file()
                    or (MODULE / module.replace(".", "/") / alias.name / "__init__.py").is_file()
                )


def _python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def _is_shared(module: str) -> bool:
    return module in PARENTS or any(module == name or module.startswith(name + ".") for name in SHARED)


def _importing(files: Iterable[Path], refused: Callable[[str], bool]) -> list[str]:
    """Where the files import what is refused."""
    return [f"{_where(path, line)} imports {name}" for path in files for name, line in _imports(path) if refused(name)]


@pytest.mark.slow
def test_engine_never_imports_slicer_or_qt() -> None:
    files = [*_python_files(ENGINE), *_python_files(LABORATORY)]
    assert _importing(files, lambda name: name.split(".")[0] in SLICER_SIDE) == []
    # a folder without an __init__ imports from a checkout but is easily lost from a package, and mypy skips it
    assert [path for path in {path.parent for path in _python_files(ENGINE)} if not (path / "__init__.py").is_file()] == []


def test_shared_modules_need_only_what_slicer_has() -> None:
    files = [MODULE / parent.replace(".", "/") / "__init__.py" for parent in PARENTS]
    for name in SHARED:
        path = MODULE / name.replace(".", "/")
        files += _python_files(path) if path.is_dir() else [path.with_suffix(".py")]
    for path in files:
        known = sys.stdlib_module_names | IN_SLICER | WHERE_THERE.get(path.name, set())
        assert _importing([path], lambda name, known=known: name.split(".")[0] not in known and not _is_shared(name)) == []  # type: ignore[misc]


def test_code_inside_slicer_uses_the_shared_modules_only() -> None:
    heavy = {"accelerate", "diffusers", "monai", "peft", "safetensors", "torch", "transformers"}
    files = [*_python_files(PANEL), *MODULE.glob("*.py")]
    assert _importing(files, lambda name: name.split(".")[0] in heavy) == []
    assert _importing(files, lambda name: name.startswith("progidiff") and not _is_shared(name)) == []


@pytest.mark.slow
def test_nothing_unpickles() -> None:
    files = [*_python_files(MODULE), *_python_files(LABORATORY)]
    found = _importing(files, lambda name: name.split(".")[0] in UNSAFE_MODULES)
    for path in files:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                unsafe = {("allow_pickle", True), ("weights_only", False)}
                options = {(each.arg, each.value.value) for each in node.keywords if isinstance(each.value, ast.Constant)}
                if call == "torch.load" or options & unsafe:
                    found.append(f"{_where(path, node.lineno)} calls {call}")
    assert found == []


def test_the_product_knows_nothing_of_the_laboratory() -> None:
    found = _importing(_python_files(MODULE), lambda name: name.split(".")[0] == "experiments")
    # folders of labelled images that the project may measure on and not ship
    private = re.compile(r"\bresearch/|\bexperiments/")
    for path in [*MODULE.rglob("*"), ROOT / "CMakeLists.txt"]:
        if path.suffix in {".py", ".txt", ".ui", ".json", ".html", ".j2"}:
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{_where(path, n)}: {line.strip()}" for n, line in enumerate(lines, 1) if private.search(line)]
    assert found == []


def test_every_file_of_the_extension_is_listed_for_cmake() -> None:
    tool = _update_cmake_lists()
    text = (MODULE / "CMakeLists.txt").read_text(encoding="utf-8")
    scripts, resources = tool.shipped_files()
    remedy = "run .venv/bin/python Utilities/update_cmake_lists.py"
    assert tool.listed_files(text, "MODULE_PYTHON_SCRIPTS") == scripts, remedy
    assert tool.listed_files(text, "MODULE_PYTHON_RESOURCES") == resources, remedy
    assert tool.with_lists(text, scripts, resources) == text, remedy


def test_no_file_is_too_large() -> None:
    large = [
        f"{path.relative_to(ROOT)}: {size}" for path in _repository_files() if (size := path.stat().st_size) > MAX_FILE_BYTES
    ]
    assert large == []


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    folders = "|".join(("home", "root", "work", "mnt", "Users"))
    pattern = re.compile(rf"(?<![\w.~>])/(?:{folders})/\w")
    found = []
    for path in _repository_files():
        if path.suffix in {".py", ".md", ".txt", ".toml", ".sh", ".json", ".yaml", ".cmake", ".s4ext", ".html", ""}:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [f"{_where(path, n)}: {line.strip()[:80]}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []


@pytest.mark.slow
def test_dependencies_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w.-]", entry)[0].lower().replace("_", "-") for entry in project["dependencies"]}
    distributions = packages_distributions()
    used: dict[str, str] = {}
    laboratory = [path for path in _python_files(LABORATORY) if "tests" not in path.relative_to(LABORATORY).parts]
    for path in [*_python_files(ENGINE), *laboratory]:
        for name, line in _imports(path):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in {"progidiff", "experiments"}:
                used.setdefault(top, _where(path, line))
    missing = {
        f"{where} imports {top}"
        for top, where in used.items()
        if not {d.lower().replace("_", "-") for d in distributions.get(top, [top])} & declared
    }
    assert missing == set()


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["dependencies"] + [e for extra in project["optional-dependencies"].values() for e in extra]
    lines = (ROOT / "Utilities/constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {re.split(r"[^\w.-]", entry)[0].lower() for entry in entries} - pinned == set()


def test_descriptions_of_the_extension_agree() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    index = json.loads((ROOT / "ProGiDiffSlicer.json").read_text(encoding="utf-8"))
    lines = (ROOT / "ProGiDiffSlicer.s4ext").read_text(encoding="utf-8").splitlines()
    s4ext = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    settings = dict(re.findall(r'^set\((EXTENSION_\w+) "(.*)"\)$', cmake, re.MULTILINE))

    assert re.findall(r"^project\((\w+)\)$", cmake, re.MULTILINE) == ["ProGiDiffSlicer"]
    assert [settings["EXTENSION_DEPENDS"]] == index["build_dependencies"] == [s4ext["depends"]]
    assert index["scm_url"] == s4ext["scmurl"]
    assert index["scm_revision"] == s4ext["scmrevision"]
    assert index["category"] == s4ext["category"]
    assert settings["EXTENSION_HOMEPAGE"] == s4ext["homepage"]
    assert settings["EXTENSION_DESCRIPTION"] == s4ext["description"]
    assert settings["EXTENSION_CONTRIBUTORS"] == s4ext["contributors"]
    assert settings["EXTENSION_ICONURL"] == s4ext["iconurl"]
    assert settings["EXTENSION_SCREENSHOTURLS"] == s4ext["screenshoturls"]


def test_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^]]*)\]", changelog, re.MULTILINE)
    assert newest.group(1) == progidiff.__version__


@pytest.mark.parametrize(
    "path", [p for p in _repository_files() if p.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_between_documents_resolve(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_troubleshooting_quotes_messages_that_exist() -> None:
    document = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        phrase for row in re.findall(r"^\| (\".*?) \|", document, re.MULTILINE) for phrase in re.findall(r'"(.+?)"', row)
    ]
    assert len(quoted) > 50
    texts = [(ROOT / "Utilities/setup.sh").read_text(encoding="utf-8")]
    for path in [*_python_files(ENGINE), *_python_files(PANEL), *MODULE.glob("*.py")]:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    assert [phrase for phrase in quoted if not any(phrase in text for text in texts)] == []


#: Stems that several files of the product have: a panel, a command and a process are called like their subject.
SHARED_STEMS = {
    "__init__",
    "client",
    "curating",
    "evaluate",
    "examples",
    "labelmaps",
    "parameters",
    "process",
    "proposals",
    "report",
    "session",
    "tuning",
}
#: The client of a worker behind a blocking pipe, and of one behind Qt's process.
SHARED_CLASSES = {"WorkerClient"}


def test_names_are_given_once() -> None:
    stems, classes = Counter[str](), Counter[str]()
    for path in MODULE.rglob("*.py"):
        stems[path.stem] += 1
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    assert {stem for stem, count in stems.items() if count > 1} == SHARED_STEMS
    assert {name for name, count in classes.items() if count > 1} == SHARED_CLASSES
