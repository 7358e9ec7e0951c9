"""The package as a whole: lazy imports, public names, versions, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_aha


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(hf_aha.__file__).resolve().parent
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib", "PIL")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["hf_aha", "hf_aha.cli", "hf_aha.commands.explain"])
def test_import_loads_nothing_heavy(module):
    loaded = run_python(f"import {module}, sys; print(*(name for name in {HEAVY} if name in sys.modules))")
    assert loaded == ""


def test_a_lazy_name_loads_on_first_use_and_is_then_kept():
    code = (
        "import hf_aha, sys; assert 'TransportRanker' not in vars(hf_aha); first = hf_aha.TransportRanker; "
        "print('torch' in sys.modules, 'transformers' in sys.modules, vars(hf_aha)['TransportRanker'] is first)"
    )
    assert run_python(code) == "True False True"


@pytest.mark.parametrize("name", hf_aha.__all__)
def test_public_name_resolves(name):
    value = getattr(hf_aha, name)
    if name != "__version__":
        assert value.__module__ == f"hf_aha.{hf_aha._MODULE_OF[name]}", "the table names a module that only re-exports"
        assert value.__doc__, f"{name} has no docstring"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'hf_aha' has no attribute 'AhaExplorer'"):
        _ = hf_aha.AhaExplorer


def test_the_three_lists_of_public_names_agree():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    for_type_checkers = {
        alias.name: statement.module for statement in guarded.body for alias in getattr(statement, "names", ())
    }
    assert for_type_checkers == hf_aha._MODULE_OF
    assert set(hf_aha.__all__) == {*hf_aha._MODULE_OF, "__version__"}
    assert set(hf_aha.__all__) <= set(dir(hf_aha))


def test_pyproject_and_citation_state_the_version_of_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in pyproject
    assert 'version = { attr = "hf_aha.__version__" }' in pyproject
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE).group(1) == hf_aha.__version__


def test_constraints_pin_every_direct_dependency():
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in pins}
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|dev) = \[(.*?)\]", pyproject, re.MULTILINE | re.DOTALL)
    wanted = {name for text in lists for name in re.findall(r'"([\w-]+)[<>=]', text)}
    assert len(lists) == 2 and {"torch", "transformers", "pytest"} <= wanted
    assert wanted <= pinned
    # The package's own tests must not come to need it unnoticed.
    assert "torchvision" not in pinned | wanted


def repository_files() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_file_holds_a_path_of_one_machine():
    # Not preceded by a letter, so that an address such as https://example.org/home/ is no hit.
    machine_path = re.compile(rb"(?<![\w.])/(?:work|root|home|tmp)/")
    found = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found += [
                f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace')}"
                for number, line in enumerate(content.splitlines(), 1)
                if machine_path.search(line)
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_reads_no_pickles(path):
    """Weights are safetensors and arrays are loaded without pickles, which could run code.

    The optimiser's state alone is torch's format, read with `weights_only=True`, which runs none.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if ast.unparse(node) != "from pickle import UnpicklingError":
                assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & set(names), ast.unparse(
                    node
                )
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) == "torch.load":
                assert {word.arg: ast.unparse(word.value) for word in node.keywords}.get("weights_only") == "True"
            elif path.name != "training_state.py":
                assert ast.unparse(node.func) != "torch.save", ast.unparse(node)
            allowed = [word.value for word in node.keywords if word.arg == "allow_pickle"]
            assert all(isinstance(value, ast.Constant) and value.value is False for value in allowed)
