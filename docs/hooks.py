"""Pages of the site that stand elsewhere: notebooks, files at the root, the command line.

MkDocs calls these functions. A picture of a notebook without a text for those who do not
see it (`alt` in its cell's metadata) ends the build.
"""

import re
from pathlib import Path

import nbformat
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from traitlets.config import Config
from typer.cli import get_docs_for_click

from emaopt.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {  # file in the repository -> page
    "MIGRATING.md": "project/migrating.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
}
PAGES |= {
    f"notebooks/{path.name}": f"tutorials/{path.stem}.md"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
SOURCE = "https://github.com/emaopt/emaopt/blob/main/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        if source.endswith(".ipynb"):
            text, pictures = notebook(ROOT / source)
            for name, content in pictures.items():
                place = str(Path(page).parent / name)
                files.append(File.generated(config, place, content=content))
        else:
            text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=linked(text, source, page)))
    commands = File.generated(config, "reference/command-line.md", content=command_line())
    files.append(commands)
    return files


def command_line() -> str:
    """What `emaopt --help` and the help of each command say."""
    command = typer.main.get_command(app)
    for one in command.commands.values():  # type: ignore[attr-defined]
        one.short_help = (one.help or "").partition("\n")[0]  # in the list, not cut short
    context = command.make_context("emaopt", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="emaopt")
    return text.replace("# `emaopt`", "# The command line", 1)


def on_page_markdown(
    markdown: str, page: object, config: MkDocsConfig, files: Files
) -> str:
    """Links out of docs/ lead to their page here, or to the repository."""
    path = page.file.src_path  # type: ignore[attr-defined]
    return markdown if path in PAGES.values() else linked(markdown, f"docs/{path}", path)


def linked(text: str, source: str, page: str) -> str:
    """The text of a file of the repository with links that are right on its page."""

    def right(match: re.Match[str]) -> str:
        opening, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:|#|$", target):
            return match[0]
        path = (ROOT / source).parent / target
        try:
            there = str(path.resolve().relative_to(ROOT))
        except ValueError:
            return match[0]
        here = PAGES.get(there) or (there[5:] if there.startswith("docs/") else None)
        if here is None:
            # A picture that a notebook made is no file of the repository.
            return match[0] if not path.exists() else f"{opening}{SOURCE}{there}{anchor})"
        up = len(Path(page).parent.parts)
        return f"{opening}{'../' * up}{here}{anchor})"

    # Not in code: fenced blocks and spans are left as they are.
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    link = re.compile(r"(\]\()([^)\s#]*)(#[^)\s]*)?\)")
    return "".join(
        part if i % 2 else link.sub(right, part) for i, part in enumerate(parts)
    )


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    book = nbformat.read(path, as_version=4)
    options = Config({"ExtractOutputPreprocessor": {"enabled": True}})
    text, resources = MarkdownExporter(config=options).from_notebook_node(book)
    pictures = {f"{path.stem}-{name}": x for name, x in resources["outputs"].items()}
    texts = [
        cell.metadata.get("alt")
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    if None in texts or "" in texts:
        number = next(i for i, alt in enumerate(texts, start=1) if not alt)
        raise PluginError(
            f"{path}: picture {number} has no `alt` in its cell's metadata."
        )
    alts = iter(texts)

    def picture(match: re.Match[str]) -> str:
        return f"![{next(alts)}]({path.stem}-{match[1]})"

    text = re.sub(r"!\[png\]\(([^)]+)\)", picture, text)
    return text, pictures
