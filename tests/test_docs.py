"""The documentation as a whole: links, anchors, navigation, figures, and an API reference that is complete."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from documents import ALL_PAGES, API_PAGES, DOCS, LANGUAGES, ROOT, anchors, blocks, directives, links, name_of

import hf_aha
from hf_aha.cli import COMMANDS


# Public beside the names of `hf_aha` itself: every subpackage that is no command of its own, and the modules that
# users build their own work from.
MODULES = ("perturbation", "ranking", "refinement", "visualization")
SUBPACKAGES = [
    module.name
    for module in pkgutil.iter_modules(hf_aha.__path__)
    if module.ispkg and module.name not in ("commands", "demo")
]


def public_names() -> dict[str, object]:
    """Every public name of the package, and what it stands for."""
    found = {f"hf_aha.{name}": getattr(hf_aha, name) for name in hf_aha.__all__}
    for module_name in (*MODULES, *SUBPACKAGES):
        module = importlib.import_module(f"hf_aha.{module_name}")
        found |= {f"hf_aha.{module_name}.{name}": getattr(module, name) for name in module.__all__}
    return found


def resolve(name: str) -> object:
    """What a dotted name stands for; an attribute before a module of the same name."""
    value: object = hf_aha
    path = "hf_aha"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(path)
    return value


@pytest.fixture(scope="module")
def documented() -> dict[str, object]:
    return {name: resolve(name) for name in directives()}


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_and_anchors_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{name_of(page)} links {link}"
        assert place.is_relative_to(ROOT), f"{name_of(page)} links {link}, which is not of this repository"
        if anchor:
            assert anchor in anchors(place), f"{name_of(page)} links {link}; there are {sorted(anchors(place))}"


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def places(entries: list) -> list[str]:
        values = [value for entry in entries for value in entry.values()]
        return [place for value in values for place in (places(value) if isinstance(value, list) else [value])]

    listed = places(site["nav"])
    assert max(Counter(listed).values()) == 1
    hooks = ast.parse((DOCS / "site_hooks.py").read_text(encoding="utf-8")).body
    assigned = next(node for node in hooks if isinstance(node, ast.Assign) and node.targets[0].id == "ELSEWHERE")
    elsewhere = ast.literal_eval(assigned.value)
    assert all((ROOT / source).is_file() for source in elsewhere)
    pages = {path.relative_to(DOCS).as_posix() for path in (*DOCS.glob("*.md"), *API_PAGES)}
    assert set(listed) == pages | set(elsewhere.values())
    assert site["strict"] is True and site["theme"]["font"] is False


def test_every_picture_is_shown_by_a_page():
    shown = {(page.parent / link).resolve() for page in ALL_PAGES for link in links(page)}
    assert {path for path in (DOCS / "images").glob("*.png") if path.resolve() not in shown} == set()


def test_a_block_has_a_known_language():
    for page in ALL_PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{block.page}:{block.line} is {block.language!r}"
            if block.language == "yaml":
                yaml.safe_load(block.text)
            # What is shown in a tree or a drawing may be unlabelled in a page, but Python may not hide there.
            assert block.language or not block.text.startswith(("import ", "from ")), f"{block.page}:{block.line}"


# ----------------------------------------------------------------------------------------------------- API reference


def test_the_reference_names_what_exists_once(documented):
    assert len(directives()) == len(set(directives()))
    assert all(name.startswith("hf_aha.") for name in documented)


@pytest.mark.parametrize("name", public_names())
def test_public_name_is_in_the_reference(name, documented):
    value = public_names()[name]
    assert name in documented or any(other is value for other in documented.values()), (
        f"add '::: {name}' to a page of docs/api/"
    )


@pytest.mark.parametrize("name", directives())
def test_documented_name_and_its_public_members_have_docstrings(name, documented):
    value = documented[name]
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return  # a constant: the next test
    assert has_docstring(value), f"{name} has no docstring"
    if not inspect.isclass(value):
        return
    for member, own in vars(value).items():
        function = own.fget if isinstance(own, property) else getattr(own, "__func__", getattr(own, "func", own))
        if member.startswith("_") or not inspect.isfunction(function) or inspect.getmodule(function) is None:
            continue
        if function.__module__.startswith("hf_aha"):
            assert function.__doc__ or overrides_documented(value, member), f"{name}.{member} has no docstring"


def test_the_page_of_the_command_line_lists_every_command():
    page = (DOCS / "api" / "command-line.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `hf-aha ([\w-]+)` \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(name, summary) for name, (summary, _) in COMMANDS.items()]


def has_docstring(value: object) -> bool:
    # A dataclass without one gets its signature.
    return bool(value.__doc__) and not value.__doc__.startswith(f"{value.__name__}(")


def overrides_documented(value: type, member: str) -> bool:
    """Whether a base class of our own says what the method does."""
    bases = [base for base in value.__mro__[1:] if member in vars(base)]
    return any(base.__module__.startswith("hf_aha") and vars(base)[member].__doc__ for base in bases)


@pytest.mark.parametrize("name", directives())
def test_documented_constant_has_a_docstring(name, documented):
    value = documented[name]
    if inspect.isclass(value) or inspect.isroutine(value) or name == "hf_aha.__version__":
        return
    short = name.rpartition(".")[2]
    assert any(short in documented_constants(path) for path in sorted(Path(hf_aha.__file__).parent.rglob("*.py"))), (
        f"put a docstring under the assignment of {name}"
    )


def documented_constants(path: Path) -> set[str]:
    """Names of a module's assignments that a string literal follows."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = set()
    for node, after in zip(body, body[1:], strict=False):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found
