"""The front page: what it shows runs, and the Spanish one says the same."""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "README.es.md")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_what_the_front_page_shows_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks(page)[:2]:
        # A program of its own, so not under the future imports of this one.
        exec(compile(block, page, "exec", dont_inherit=True), names)  # noqa: S102 - it is ours, and what is tested
    asyncio.run(names["main"]())
    assert "1 User(user_id='42', email='ana@example.org')" in (printed := capsys.readouterr().out)
    assert "mail to ana@example.org" in printed
    names["test_nobody_registers_twice"]()


def test_both_front_pages_have_the_same_code_and_the_same_parts() -> None:
    english, spanish = ([ast.dump(ast.parse(block)) for block in blocks(page)] for page in PAGES)
    assert english == spanish
    for part in (r"^#+ ", r"^```", r"^- \*\*", r"^\*\*", r"\]\((?!README)[^)]*\)"):
        english, spanish = (re.findall(part, text(page), re.MULTILINE) for page in PAGES)
        assert english == spanish


@pytest.mark.parametrize("page", PAGES)
def test_what_the_front_page_links_to_is_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", text(page))
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert set(PAGES) - {page} <= set(links)
