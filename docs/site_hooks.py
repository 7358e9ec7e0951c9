"""What MkDocs needs to know beyond its settings: pages that lie elsewhere, formulas, and links in docstrings."""

from __future__ import annotations

import re
import xml.etree.ElementTree as etree
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parent.parent

# Where a file of the repository stands in the site. Pages link the file, so that the link works in a checkout, too.
ELSEWHERE = {
    "recipes/README.md": "recipes.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/imagenette-demo/evaluation/results.md": "results-imagenette-demo.md",
    "benchmarks/results/vit-s14/evaluation/results.md": "results-vit-s14.md",
}

# The page of a file that the site does not show has no link; its name stays.
_LINK = re.compile(r"\[([^\[\]]+)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
_DEFINITION = re.compile(r"^(\[[^\[\]]+\]): (\.\./\S+)$", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# One line of a docstring about several attributes, which the parser takes for one with a type.
_SEVERAL = re.compile(
    r"(<b><code>(?:<[^>]+>)*\w+),((?:</span>|</autoref>|</a>)*</code></b>)\s*\(<code>\((.+?)\)</code>\)"
)
_DIRECTIVE = re.compile(r"^::: ([\w.]+)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Teach Markdown the links and examples of our docstrings."""
    documented = []
    for page in sorted((Path(config.docs_dir) / "api").glob("*.md")):
        documented += _DIRECTIVE.findall(page.read_text(encoding="utf-8"))
    config.markdown_extensions.append(Docstrings(documented))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside `docs/`."""
    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links to files of the repository into links to their pages, or into their names."""
    original = next((source for source, place in ELSEWHERE.items() if place == page.file.src_uri), None)
    folder = Path("docs", page.file.src_uri).parent if original is None else Path(original).parent
    up = "../" * page.file.src_uri.count("/")

    def place(target: str) -> str | None:
        parts: list[str] = []
        for part in [*folder.parts, *target.split("/")]:
            parts = parts[:-1] if part == ".." else [*parts, part]
        target = "/".join(parts)
        if target.startswith("docs/"):
            return up + target.removeprefix("docs/")
        return up + ELSEWHERE[target] if target in ELSEWHERE else None

    def mend(match: re.Match[str]) -> str:
        text, anchor, found = match.group(1), match.group(3) or "", place(match.group(2))
        return text if found is None else f"[{text}]({found}{anchor})"

    markdown = _DEFINITION.sub(lambda match: f"{match.group(1)}: {place(match.group(2)) or match.group(2)}", markdown)
    return _LINK.sub(mend, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Write formulas as MathML, which browsers draw by themselves, and name attributes that share a line alike."""

    def formula(match: re.Match[str]) -> str:
        tex = match.group(3).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(" ".join(tex.split()), display="block" if match.group(2) == "[" else "inline")

    return _SEVERAL.sub(r"\1\2<b><code>, \3</code></b>", _FORMULA.sub(formula, html))


class Docstrings(Extension):
    """Links such as [`AhaExplainer.explain`] in docstrings, and their doctests as code."""

    def __init__(self, documented: list[str]) -> None:
        super().__init__()
        self.documented = documented

    def extendMarkdown(self, md: Markdown) -> None:
        """Register both with one converter."""
        # Before fenced blocks are found, and before other brackets are read as links.
        md.preprocessors.register(_Doctests(md), "hf_aha_doctests", 40)
        md.inlinePatterns.register(_NameLinks(md, self.documented), "hf_aha_names", 195)


class _NameLinks(InlineProcessor):
    def __init__(self, md: Markdown, documented: list[str]) -> None:
        super().__init__(r"\[`([A-Za-z_][\w.]*)`\](?:\[\])?(?![\[(:])", md)
        self.place = {name.rpartition(".")[2]: name for name in reversed(documented)}

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[etree.Element, int, int]:
        shown = match.group(1)
        first, _, rest = shown.removeprefix("hf_aha.").partition(".")
        identifier = self.place.get(first)
        element = etree.Element("code") if identifier is None else etree.Element("autoref", optional="")
        if identifier is None:
            element.text = shown
        else:
            element.set("identifier", f"{identifier}.{rest}" if rest else identifier)
            etree.SubElement(element, "code").text = shown
        return element, match.start(0), match.end(0)


class _Doctests(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        """Put every run of lines that begins with a prompt, up to an empty line, into a fence of its own."""
        found, fenced, open_here = [], False, False
        for line in lines:
            if line.lstrip().startswith("```"):
                fenced = not fenced
            if not fenced and not open_here and line.startswith(">>> "):
                found.append("```pycon")
                open_here = True
            elif open_here and not line.strip():
                found.append("```")
                open_here = False
            # What a reader of the page need not see.
            found.append(re.sub(r"\s*# doctest: \+\w+", "", line) if open_here else line)
        return [*found, "```"] if open_here else found
