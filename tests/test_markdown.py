"""Text of others inside Markdown: whatever it holds, it stays text."""

from __future__ import annotations

import ast
import html
import unicodedata

import pytest

from hf_aha.markdown import Markdown, as_markdown, clean_text, code_string, escape_markdown, table


HOSTILE = [
    "# heading",
    "a | b | c",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "<script>alert(1)</script>",
    "<!-- comment",
    "**bold** _it_ `code` ~~gone~~ $math$",
    "{{ 7 * 7 }} {% for x in y %}{# note #}",
    "two\nlines\n\n---\nlicense: mit",
    "line\u2028separator\u2029and\u0085more",
    "\u202egnp.exe\u202c",
    "www.evil.example and me@evil.example",
    '"quoted" \\ back',
    "nul\0bell\a",
    "lone \ud800 surrogate",
    "```python\nimport os\n```",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_is_one_line_without_any_special_character_and_reads_as_it_was(text):
    escaped = escape_markdown(text)
    assert not set('\\`*[]{}<>|~$@:!"') & set(escaped)
    assert "\n" not in escaped and "www." not in escaped
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in escaped)
    assert html.unescape(escaped) == clean_text(text)
    escaped.encode("utf-8")


@pytest.mark.parametrize("text", ["English springer", "vit_base-patch16, 3.5 (px)", "пёс", "nick's 100 %", "می‌خواهم"])
def test_plain_text_stays_as_it_is(text):
    assert escape_markdown(text) == text


def test_an_underscore_is_escaped_where_it_could_begin_emphasis():
    assert escape_markdown("a_b _c_ d_") == "a_b &#95;c&#95; d&#95;"


def test_long_text_is_cut():
    assert len(clean_text("x" * 1000)) == 200 and clean_text("x" * 1000).endswith("…")
    assert clean_text("abcdef", limit=4) == "abc…"


@pytest.mark.parametrize("text", HOSTILE)
def test_code_string_is_one_literal_of_the_text(text):
    assert ast.literal_eval(code_string(text)) == clean_text(text)
    assert "\n" not in code_string(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_keeps_its_shape(text):
    lines = table([text, "n"], [[text, 1], [Markdown("**1**"), text]]).splitlines()
    assert [line.count("|") for line in lines] == [3, 3, 3, 3]
    assert lines[3].startswith("| **1** |")


def test_only_our_own_markdown_passes_unescaped():
    assert as_markdown(Markdown("**a**")) == "**a**"
    assert as_markdown("**a**") == "&#42;&#42;a&#42;&#42;"
    assert as_markdown(None) == "" and as_markdown(1.5) == "1.5"
