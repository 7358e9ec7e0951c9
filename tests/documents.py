"""Reading the documentation as data: its code blocks with their markers, links, headings and API directives."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "recipes" / "README.md"]
API_PAGES = sorted((DOCS / "api").glob("*.md"))
ALL_PAGES = [*PAGES, *API_PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]

LANGUAGES = ("python", "bash", "yaml", "json", "text", "bibtex", "")

# What begins a command in a block without a language.
_COMMANDS = ("hf-aha", "python", "make", "pip", "accelerate", "torchrun", "hf", ".venv-bench/bin/python")
_FENCE = re.compile(r"^( *)(```+)([\w-]*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
_SETTING = re.compile(r"^[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language (`bash` where unlabelled lines are commands), and why it is not run, if so."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    def commands(self) -> list[list[str]]:
        """The words of every command of a shell block; settings before a command (`NAME=value`) are left out."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [[word for word in words if not _SETTING.match(word)] for words in lines if words]


def name_of(page: Path) -> str:
    """`docs/index.md`, `README.md`."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        content = textwrap.dedent(match.group(4))
        language = match.group(3) or ("bash" if _looks_like_shell(content) else "")
        marker = _MARKER.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(name_of(page), line, language, content, marker and marker.group(1)))
    return found


def _looks_like_shell(content: str) -> bool:
    lines = [line for line in content.splitlines() if line.strip() and not line.startswith("#")]
    words = lines[0].split() if lines else []
    return next((word for word in words if not _SETTING.match(word)), None) in _COMMANDS


def prose(page: Path) -> str:
    """The page without its code, inline code, formulas and comments."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL))


def links(page: Path) -> list[str]:
    """The targets of all links and pictures of a page that are no addresses of the web."""
    text = prose(page)
    found = re.findall(r"\]\(([^()\s]+)(?: \"[^\"]*\")?\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    found += re.findall(r"^\[[^\[\]]+\]: (\S+)$", text, re.MULTILINE)
    return [target for target in found if not re.match(r"(https?|mailto):", target)]


def anchors(page: Path) -> set[str]:
    """The anchors that both GitHub and MkDocs give to the headings of a page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = [re.sub(r"[`*]", "", line) for line in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)]
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    # GitHub keeps every hyphen, MkDocs draws them together.
    github, mkdocs = ({slug.replace(" ", "-") for slug in slugs}, {re.sub(r"[-\s]+", "-", slug) for slug in slugs})
    return github & mkdocs


def directives(pages: list[Path] = API_PAGES) -> list[str]:
    """The names that the API reference documents, in order."""
    return [name for page in pages for name in re.findall(r"^::: ([\w.]+)", page.read_text("utf-8"), re.MULTILINE)]
