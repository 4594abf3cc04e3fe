"""What MkDocs needs to know of this repository: pages at its top, the package's layout, links to source files."""

import posixpath
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TOP_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")

_layout: str | None = None


@event_priority(100)
def on_config(config):
    """Give mkdocstrings, which reads files, a copy of the package laid out as installed."""
    global _layout
    _layout = tempfile.mkdtemp()
    subprocess.run([ROOT / ".ci" / "copy-as-installed", _layout], check=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_layout]
    return config


def on_files(files, config):
    for name, page in TOP_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links between pages at the site's names; where a link leads to a source file, keep its text alone."""
    uri = page.file.src_uri
    source = next((name for name, generated in TOP_PAGES.items() if generated == uri), f"docs/{uri}")

    def follow(match):
        picture, text, target, anchor = match.groups(default="")
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = TOP_PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(name) is None or not (path in TOP_PAGES or path.startswith("docs/")):
            return text
        return f"{picture}[{text}]({posixpath.relpath(name, posixpath.dirname(uri) or '.')}{anchor})"

    return LINK.sub(follow, markdown)


def on_post_build(config):
    if _layout:
        shutil.rmtree(_layout, ignore_errors=True)
