"""What ships with the extension: an installation made of what CMake's lists name works, and the index would take it."""

from __future__ import annotations

import compileall
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "ProGiDiffSlicer"
NAME = "ProGiDiffSlicer"
PNG = b"\x89PNG\r\n\x1a\n"

# Opens the panel of an installation in a Python that has never seen the checkout's, and imports every module.
PROBE = """
import importlib, sys
from pathlib import Path

installed, root = Path(sys.argv[1]), sys.argv[2]
sys.path[:] = [str(installed), *(p for p in sys.path if not Path(p, "progidiff").is_dir()), root]

from Testing import slicer_host as host
host.install()
host.start()

before = set(sys.modules)
loaded = host.load_module(installed / "ProGiDiffSlicer.py")
panels = loaded.widget.panels
names = {"SimpleITK", "torch", "diffusers", "scipy", "nibabel", "pydantic", "psutil", "matplotlib"}
print("heavy:", sorted(names & (set(sys.modules) - before)))
print("panels:", ", ".join(type(p).__name__ for p in (panels.setup, panels.prompt, panels.proposals, panels.review)))
print("packages:", panels.setup.ui.packagesTable.rowCount)
print("model:", panels.setup.ui.modelText.text.splitlines()[0])
loaded.unload()

names = [path.relative_to(installed).with_suffix("") for path in sorted((installed / "ProGiDiffSlicerLib").rglob("*.py"))]
for name in [".".join(n.parts).removesuffix(".__init__") for n in names]:
    importlib.import_module(name)

from progidiff.places import sample_volume
from progidiff.places import default_model_folder
found = [sample_volume(), default_model_folder()]
ours = ("progidiff", "ProGiDiffSlicerLib", "ProGiDiffSlicer")
found += [Path(module.__file__) for name, module in sys.modules.items() if name.split(".")[0] in ours]
outside = sorted(str(path) for path in found if not path.resolve().is_relative_to(installed.resolve()))
print("outside:", outside)
"""

# What a build tree of Slicer gives to an extension, as far as this one uses it: files are copied to where Slicer looks for
# scripted modules, and that folder is installed as a whole.
SLICER_CONFIG = """
set(Slicer_USE_FILE ${CMAKE_CURRENT_LIST_DIR}/UseSlicer.cmake)
"""
USE_SLICER = """
set(Slicer_QTSCRIPTEDMODULES_LIB_DIR lib/Slicer-5.12/qt-scripted-modules)
set(Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR ${Slicer_QTSCRIPTEDMODULES_LIB_DIR})
file(WRITE ${CMAKE_BINARY_DIR}/empty.cmake "")
set(Slicer_EXTENSION_GENERATE_CONFIG ${CMAKE_BINARY_DIR}/empty.cmake)
set(Slicer_EXTENSION_CPACK ${CMAKE_BINARY_DIR}/empty.cmake)
set(BUILD_TESTING ON)
enable_testing()
macro(slicerMacroBuildScriptedModule)
  cmake_parse_arguments(MY "WITH_GENERIC_TESTS" "NAME" "SCRIPTS;RESOURCES" ${ARGN})
  if(MY_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "not an argument of this macro: ${MY_UNPARSED_ARGUMENTS}")
  endif()
  set(_modules ${CMAKE_BINARY_DIR}/${Slicer_QTSCRIPTEDMODULES_LIB_DIR})
  foreach(_file ${MY_SCRIPTS} ${MY_RESOURCES})
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/${_file} ${_modules}/${_file} COPYONLY)
  endforeach()
  install(DIRECTORY ${_modules}/ DESTINATION ${Slicer_INSTALL_QTSCRIPTEDMODULES_LIB_DIR} COMPONENT RuntimeLibraries)
  if(MY_WITH_GENERIC_TESTS)
    add_test(NAME generic_${MY_NAME} COMMAND ${CMAKE_COMMAND} -E true)
  endif()
endmacro()
macro(slicer_add_python_unittest)
  cmake_parse_arguments(MY "" "SCRIPT" "" ${ARGN})
  get_filename_component(_name ${MY_SCRIPT} NAME_WE)
  add_test(NAME py_${_name} COMMAND ${CMAKE_COMMAND} -E cat ${CMAKE_CURRENT_SOURCE_DIR}/${MY_SCRIPT})
endmacro()
macro(slicer_add_python_test)
  cmake_parse_arguments(MY "" "SCRIPT;TESTNAME_PREFIX" "" ${ARGN})
  get_filename_component(_name ${MY_SCRIPT} NAME_WE)
  add_test(NAME py_${MY_TESTNAME_PREFIX}${_name} COMMAND ${CMAKE_COMMAND} -E cat ${CMAKE_CURRENT_SOURCE_DIR}/${MY_SCRIPT})
endmacro()
"""


def _update_cmake_lists() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_cmake_lists", ROOT / "Utilities/update_cmake_lists.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, pattern
    return match.group(1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exactly what ProGiDiffSlicer/CMakeLists.txt names, where Slicer has it."""
    text = (MODULE / "CMakeLists.txt").read_text(encoding="utf-8")
    tool = _update_cmake_lists()
    # A space and a letter beyond ASCII, as in many a user's name.
    folder = tmp_path_factory.mktemp("Slicer é 5") / "lib/Slicer-5.12/qt-scripted-modules"
    for file in (*tool.listed_files(text, "MODULE_PYTHON_SCRIPTS"), *tool.listed_files(text, "MODULE_PYTHON_RESOURCES")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(MODULE / file, folder / file)
    bundled = folder / _found(r"\{Slicer_QTSCRIPTEDMODULES_LIB_DIR\}/(\S+)$", text)
    for name in _found(r"^foreach\(_folder ([\w ]+)\)$", text).split():
        shutil.copytree(ROOT / "Resources" / name, bundled / name)
    return folder


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PROGIDIFF"))}
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8", "QT_QPA_PLATFORM": "offscreen"}
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env=kept | settings | environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_an_installation_opens_its_panel_and_finds_its_model(installed: Path) -> None:
    result = _python("-c", PROBE, str(installed), str(ROOT))
    assert result.returncode == 0, result.stderr
    told = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert told["panels"] == "SetupPanel, PromptPanel, ProposalsPanel, ReviewPanel"
    assert int(told["packages"]) > 5
    card = json.loads((ROOT / "Resources/Models/default/model_card.json").read_text(encoding="utf-8"))
    assert card["name"] in told["model"]
    assert told["outside"] == "[]"
    assert told["heavy"] == "[]", "the panel opens without what belongs to the worker or takes long"


@pytest.mark.slow
def test_an_installation_runs_the_engine(installed: Path, tmp_path: Path) -> None:
    result = _python("-m", "progidiff", "--version", PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d+\.\d+\.\d+", result.stdout)
    compiled = tmp_path / "compiled"
    shutil.copytree(installed, compiled, ignore=shutil.ignore_patterns("_resources"))
    assert compileall.compile_dir(str(compiled), quiet=1)


def test_panels_and_ui_files_belong_together() -> None:
    used = set()
    for path in (MODULE / "ProGiDiffSlicerLib/panels").glob("*.py"):
        used |= set(re.findall(r'super\(\).__init__\("(\w+)"\)', path.read_text(encoding="utf-8")))
    assert used == {path.stem for path in (MODULE / "Resources/UI").glob("*.ui")}


def test_ui_files_refer_to_nothing_outside_of_themselves() -> None:
    """A picture of a .qrc file would have to be compiled, which a scripted module cannot."""
    for path in (MODULE / "Resources/UI").glob("*.ui"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<include location|<pixmap|<iconset(?! theme)", text), path.name


def test_listing_leaves_out_what_editors_leave_behind(tmp_path: Path) -> None:
    wanted = ("A.py", "Lib/b.py", "Resources/UI/P.ui", "Resources/Icons/A.png", "Resources/requirements.txt", "data.json")
    debris = (".DS_Store", "A.py~", "Lib/b.py.orig", "Lib/__pycache__/b.pyc", ".ruff_cache/x", "CMakeLists.txt")
    for name in (*wanted, *debris, "progidiff/_resources/Models/default/model_index.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    scripts, resources = _update_cmake_lists().shipped_files(tmp_path)
    assert scripts == ["A.py", "Lib/b.py"]
    assert resources == ["Resources/Icons/A.png", "Resources/UI/P.ui", "Resources/requirements.txt", "data.json"]


def test_cmake_installs_the_same(installed: Path, tmp_path: Path) -> None:
    """The CMake files themselves, run against a stand-in of what Slicer gives to an extension."""
    cmake = shutil.which("cmake")
    if cmake is None or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs cmake and a C compiler")
    slicer = tmp_path / "Slicer-build"
    slicer.mkdir()
    (slicer / "SlicerConfig.cmake").write_text(SLICER_CONFIG, encoding="utf-8")
    (slicer / "UseSlicer.cmake").write_text(USE_SLICER, encoding="utf-8")
    build, prefix = tmp_path / "build", tmp_path / "package"
    for command in (
        ["-S", str(ROOT), "-B", str(build), f"-DSlicer_DIR={slicer}"],
        ["--install", str(build), "--prefix", str(prefix)],
    ):
        result = subprocess.run([cmake, *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "CMake Warning" not in result.stderr
    # The stand-in's tests print the script that Slicer would run, which has to be there.
    told = subprocess.run(["ctest"], cwd=build, capture_output=True, text=True, check=True).stdout
    tests = re.findall(r"Test +#\d+: (\S+) \.+ +Passed", told)
    assert tests == [f"generic_{NAME}", f"py_{NAME}", "py_progidiff_main_path"]
    assert _files(prefix / "lib/Slicer-5.12/qt-scripted-modules") == _files(installed)


def _files(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(folder).as_posix() for path in files)


# What scripts/check_description_files.py of Slicer/ExtensionsIndex asks of an entry, as far as it can be told without a
# public address.


def _entry() -> dict[str, object]:
    entry = json.loads((ROOT / f"{NAME}.json").read_text(encoding="utf-8"))
    assert isinstance(entry, dict)
    return entry


def test_index_entry_follows_its_schema() -> None:
    entry = _entry()
    kinds = {
        "$schema": str,
        "category": str,
        "scm_url": str,
        "scm_revision": str,
        "scm_type": str,
        "build_dependencies": list,
        "build_subdirectory": str,
        "enabled": bool,
        "tier": int,
    }
    assert {"$schema", "category", "scm_url"} <= entry.keys() <= kinds.keys()
    assert all(type(value) is kinds[name] for name, value in entry.items())
    schema = str(entry["$schema"])
    assert re.fullmatch(r"https://raw\.githubusercontent\.com/Slicer/Slicer/main/Schemas/\S+-v1\.0\.1\.json#", schema)
    assert entry["tier"] in range(1, 6)
    assert entry["category"] == "Segmentation"


def test_index_accepts_the_names() -> None:
    entry, cmake = _entry(), (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    address = urlsplit(str(entry["scm_url"]))
    assert address.scheme in ("git", "https")
    assert Path(address.path).name.startswith("Slicer"), "the repository's name has to say that it is for Slicer"
    assert _found(r"project\s*\(\s*([^\s\)\n\r]+)", cmake) == NAME
    assert not NAME.startswith("Slicer"), "the extension's name does not repeat it in front"
    assert (ROOT / "LICENSE").is_file()


def _image_addresses() -> list[str]:
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    icon = _found(r'set\s*\(EXTENSION_ICONURL\s*"([^"]+)"[ ]*\)', cmake)
    return [icon, *_found(r'set\s*\(EXTENSION_SCREENSHOTURLS\s*"([^"]+)"\)', cmake).split()]


def test_index_finds_icon_and_screenshots() -> None:
    addresses = _image_addresses()
    assert len(addresses) >= 2
    assert all(address.startswith("https://") and address.endswith(".png") for address in addresses)
    homepage = _found(r'set\s*\(EXTENSION_HOMEPAGE\s*"([^"]+)"\)', (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    files = [ROOT / address.removeprefix(homepage).lstrip("/") for address in addresses]
    missing = [str(path) for path in files if not path.is_file()]
    assert missing == [], "the address of an image ends with its path in this repository"
    assert all(path.read_bytes().startswith(PNG) for path in files)


def test_description_speaks_to_a_person_who_is_no_expert() -> None:
    text = _found(r'set\s*\(EXTENSION_DESCRIPTION\s*"([^"]+)"\)', (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert 100 < len(text) < 500
    jargon = ("latent", "diffusion", "ControlNet", "LoRA", "sampling", "inference", "torch")
    assert [word for word in jargon if word.lower() in text.lower()] == []
    assert "research" in text


def test_a_checkout_is_small_enough_for_the_index() -> None:
    """The index asks for less than 100 MB."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True).stdout.decode()
    sizes = [path.stat().st_size for name in names.split("\0") if name and (path := ROOT / name).is_file()]
    assert sum(sizes) < 100_000_000
