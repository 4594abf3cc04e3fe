"""Everything that the pages name exists: files, links, commands, options, recipes, settings, the version."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from unite_fast.cli import app
from unite_fast.config import Config
from unite_fast.recipes import load_config, to_tree

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
# Not the log: its entries name files as of their date.
PAGES += sorted(path for path in ROOT.glob("docs/**/*.md") if path.name != "LOG.md")
FILE = re.compile(r"(?:^|[`\s(])((?:unite_fast|kernels|data_pipeline|configs|tests|benchmarks|docs)/[\w./*-]*\w)", re.M)
PLACEHOLDER = re.compile(r"\b(?!LOG\b)[A-Z]{2,}\b|_[A-Z]{2,}\b|\*")
EXAMPLE_OP = "scale_shift"
"""The op of docs/adding-a-kernel.md."""
COMMANDS = typer.main.get_command(app).commands

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def calls(page: Path) -> list[list[str]]:
    """The words after `unite-fast` or `-m unite_fast`, in shell blocks and in code within the text."""
    text = page.read_text()
    code = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", without_blocks(text))
    lines = [line.split(" #")[0] for part in code for line in part.replace("\\\n", " ").splitlines()]
    pattern = re.compile(r"(?:^|\s)(?:unite-fast|-m unite_fast)((?:\s+[^\s&|;]+)+)")
    split_calls = [call.split() for line in lines for call in pattern.findall(line)]
    return [call for call in split_calls if call[0] != "COMMAND"]


def settings(tree: dict, prefix: str = "") -> set[str]:
    """Dotted keys of a tree of settings, groups included."""
    names = set()
    for key, value in tree.items():
        names |= {prefix + key} | (settings(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return names


def test_the_pages_have_commands():
    assert sum(len(calls(page)) for page in PAGES) > 50


@every_page
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@every_page
def test_files_exist(page):
    for path in FILE.findall(page.read_text()):
        assert PLACEHOLDER.search(path) or EXAMPLE_OP in path or (ROOT / path).exists(), path


@every_page
def test_names_are_in_the_files_that_they_link_to(page):
    text, link = page.read_text(), r"\]\(([^)#]+\.(?:py|cpp))\)"
    named = re.findall(rf"`([\w.]+)` in \[[^\]]*{link}", text) + re.findall(rf"\[`([A-Z]\w*(?:\.\w+)?)`{link}", text)
    named += [(name, path) for path, name in re.findall(rf"{link}: (?:the )?`([\w.]+)`", text)]
    for name, path in named:
        assert re.search(rf"\b{name.split('.')[-1]}\b", (page.parent / path).read_text()), (name, path)


@every_page
def test_commands_and_options_exist(page):
    for name, *words in calls(page):
        assert name in COMMANDS, name
        command = COMMANDS[name]
        parts = [command, *getattr(command, "commands", {}).values()]
        options = {option for part in parts for parameter in part.params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, (name, words)


@every_page
def test_recipes_and_settings_exist(page):
    known = settings(to_tree(Config()))
    groups = "|".join(name for name in known if any(key.startswith(f"{name}.") for key in known))
    keys = re.findall(rf"`((?:{groups})\.(?!py`|md`)[a-z_.0-9]+)[=`]", page.read_text())
    for name, *words in calls(page):
        if name in ("train", "bench", "tune", "plan"):
            keys += [word.partition("=")[0] for word in words if re.match(r"[a-z_.0-9]+=", word)]
            recipes = [word for word in words[:1] if re.fullmatch(r"[a-z]\w+", word)]
            assert all(load_config(recipe) for recipe in recipes)
    assert set(keys) <= known


def test_every_page_is_in_the_navigation_of_the_site():
    def names(part) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [name for each in (part.values() if isinstance(part, dict) else part) for name in names(each)]

    # safe_load refuses the tags that MkDocs needs.
    text = re.sub(r"!!python/name:\S+", "", (ROOT / "mkdocs.yml").read_text())
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert set(names(yaml.safe_load(text)["nav"])) == pages | {"index.md", "contributing.md", "changelog.md"}


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
