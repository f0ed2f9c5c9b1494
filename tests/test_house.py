"""The house rules that no single room can test: import directions, what a room may load, what documents promise."""

import ast
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("profiles", "costmodel", "kernel_gen", "allocator")
MAY_LOAD_CUTLASS = ("kernel_gen.kernels", "kernel_gen.compiler")
MAY_LOAD_TORCH = (
    "kernel_gen.formats",
    "kernel_gen.experts",
    "kernel_gen.runtime",
    "kernel_gen.timing",
    "kernel_gen.measure",
    "kernel_gen.library",
    "kernel_gen.layer",
    "kernel_gen.moe",
    "allocator.calibration",
    "allocator.export.weights",
)
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])

# Import hooks run before any other finder, so what they refuse is as good as not installed.
IMPORT_WITHOUT = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import {module}
"""


def modules() -> Iterator[str]:
    """Every module of the four packages, found on disk without importing one."""
    for package in PACKAGES:
        yield package
        for info in pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}."):
            yield info.name


def is_under(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def import_without(module: str, missing: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    program = IMPORT_WITHOUT.format(module=module, missing=set(missing))
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_import_blocker_blocks() -> None:
    done = import_without("json, torch", ("torch",))
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr


def test_every_package_is_there() -> None:
    assert set(PACKAGES) <= set(modules())


@pytest.mark.parametrize("rooms_free_of", ["torch", "cutlass"])
def test_rooms_load_without_what_they_must_not_need(rooms_free_of: str) -> None:
    """One interpreter imports them all: an eager import of what is missing fails it, its traceback in the message."""
    may_load = MAY_LOAD_TORCH if rooms_free_of == "torch" else MAY_LOAD_CUTLASS
    free = [module for module in modules() if not is_under(module, may_load) and not is_under(module, MAY_LOAD_CUTLASS)]
    free = [module for module in free if not module.endswith("__main__")]
    done = import_without(", ".join(free), (rooms_free_of,))
    assert done.returncode == 0, done.stderr


def test_kernel_gen_loads_with_neither_torch_nor_cutlass() -> None:
    done = import_without("kernel_gen, kernel_gen.sweep, kernel_gen.build", ("torch", "cutlass", "tvm_ffi"))
    assert done.returncode == 0, done.stderr


def test_imports_go_one_way() -> None:
    """The contracts of pyproject.toml, kept by import-linter."""
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def third_party_imports() -> set[str]:
    """Top-level names that the packages import, however lazily, from neither Python nor this repository."""
    names = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - set(PACKAGES)


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    users_extras = ("compile", "torch", "models", "allocator", "export", "ray", "heuristics")
    requirements = [
        *project["dependencies"],
        *(line for x in users_extras for line in project["optional-dependencies"][x]),
    ]
    declared = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in requirements}
    distributions = importlib.metadata.packages_distributions()
    # The DSL's wheel puts its packages on the path with a .pth file, where no metadata lists them.
    distributions |= {"cutlass": ["nvidia-cutlass-dsl"], "cuda": ["nvidia-cutlass-dsl"]}
    for name in third_party_imports():
        owners = {owner.lower() for owner in distributions.get(name, [name])}
        assert owners & declared, f"{name} is imported and none of {sorted(owners)} is in pyproject.toml"


def test_the_contracts_name_the_rooms_that_these_tests_name() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for missing, rooms in {"torch": MAY_LOAD_TORCH, "cutlass": MAY_LOAD_CUTLASS}.items():
        (contract,) = (c for c in contracts if c.get("forbidden_modules") == [missing])
        ignored = {rule.partition(" -> ")[0].removesuffix(".**") for rule in contract["ignore_imports"]}
        assert ignored == set(rooms)


def shell_lines(document: Path) -> Iterator[str]:
    for block in re.findall(r"^```(?:console|bash|sh)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            yield line.removeprefix("$ ").partition("  #")[0].strip()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_exist(document: Path) -> None:
    """`make X` is a target of the Makefile and `python -m X` a module here or an installed one."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in shell_lines(document):
        for target in re.findall(r"(?:^|&& )make ([a-z-]+)", line):
            assert target in targets, f"{document.name}: {line}"
        for module in re.findall(r"python[0-9.]* -m ([\w.]+)", line):
            assert importlib.util.find_spec(module) is not None, f"{document.name}: {line}"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "ARCHITECTURE.md"], ids=lambda path: path.name)
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_index_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_the_readmes_python_runs_without_torch(number: int) -> None:
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) == 2
    program = IMPORT_WITHOUT.format(module="sys", missing={"torch", "cutlass"}) + blocks[number]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_readme_begins_with_the_two_commands() -> None:
    assert list(shell_lines(ROOT / "README.md"))[:2] == ["make sweep", "make test"]
