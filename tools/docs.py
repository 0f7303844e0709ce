"""The notebooks as a static site with navigation and search: `make docs` writes build/docs/html and checks it.

python tools/docs.py [--out build/docs] [--only nbs/audits]

The pages are the notebooks with their saved outputs, README and the other Markdown files, and a reference made of signatures with the comments that document parameters. Nothing is executed, nothing is
fetched. A dead link inside the site, a picture without alt text or a warning of Sphinx fails the build and is named; links to elsewhere are counted, not followed.
"""

import argparse
import ast
from pathlib import Path
import re
import shutil
import sys
from urllib.parse import unquote, urldefrag

from bs4 import BeautifulSoup
import nbformat

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"Start here": ["nbs/ten_minutes.ipynb", "nbs/howto/*.ipynb", "nbs/proof.ipynb"], "The paper, claim by claim": ["nbs/paper.ipynb", "nbs/studies/*.ipynb"], "Model, pictures, text": ["nbs/0*.ipynb"], "Data": ["nbs/data/*.ipynb"],
          "Training": ["nbs/train/*.ipynb"], "Evaluations": ["nbs/evals/*.ipynb"], "Audits": ["nbs/audits/*.ipynb"], "Humans": ["nbs/humans/*.ipynb"], "Figures and pages": ["nbs/ui/*.ipynb"], "Commands": ["nbs/7*.ipynb"]}
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "clip_lab/assets/weights/MODEL_CARD.md", "clip_lab/assets/weights/MODEL_CARD_photos.md", "clip_lab/assets/DATASHEET.md"]


def alt_of(cell, following: str) -> str:
    "What a figure shows: the text its output carries, else what the caption below calls its alt text, else the caption."
    if told := re.search(r'^#\| fig-alt: "(.*)"$', cell.source, re.M): return told[1]
    for output in cell.outputs:
        for kind, about in output.get("metadata", {}).items():
            if kind.startswith("image/") and about.get("alt"): return about["alt"]
    caption = following.strip().split("\n\n")[0]
    found = caption.split("Alt text:", 1)[-1]
    return re.sub(r"\s+", " ", re.sub(r"[*_`$]|\[([^\]]*)\]\([^)]*\)", r"\1", found)).strip() if caption.startswith("*") else ""


def prepare(notebook: Path) -> nbformat.NotebookNode:
    "A notebook as a page: directives and hidden cells are gone, figures have their alt text."
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.metadata["language_info"] = {"name": "python"}
    kept = []
    for place, cell in enumerate(nb.cells):
        if cell.cell_type == "code":
            if re.match(r"#\|\s*(hide|default_exp)", cell.source): continue
            caption = re.search(r'^#\| fig-cap: "(.*)"$', cell.source, re.M)
            if cell.source.startswith("#| echo: false"): cell.metadata["tags"] = ["remove-input"]
            if any("image/" in kind for o in cell.outputs for kind in o.get("data", {})):
                below = next((c.source for c in nb.cells[place + 1:] if c.cell_type == "markdown"), "")
                if alt := alt_of(cell, below): cell.metadata["mystnb"] = {"image": {"alt": alt}}
            cell.source = "\n".join(l for l in cell.source.splitlines() if not l.startswith("#|"))
            if not cell.source.strip() and not cell.outputs: continue
            if caption: kept += [cell, nbformat.v4.new_markdown_cell(f"*{caption[1]}*")]; continue
        kept.append(cell)
    nb.cells = kept
    return nb


def head(lines: list[str], node: ast.AST) -> str:
    "A definition up to its docstring, with the comments that document its parameters."
    first = node.body[0]
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(lines[start - 1:max(first.lineno - 1, node.lineno)])


def said(node: ast.AST, indent: str = "") -> str:
    "A docstring as comments below its definition."
    return "".join(f"\n{indent}    # {line}".rstrip() for line in (ast.get_docstring(node) or "").splitlines())


def described(lines: list[str], node: ast.AST) -> str:
    "What a reader needs of a function or class: its head, its fields, and the heads of its public methods."
    if not isinstance(node, ast.ClassDef): return head(lines, node)
    parts = [head(lines, node)]
    for member in node.body:
        if isinstance(member, (ast.AnnAssign, ast.Assign)): parts.append("\n".join(lines[member.lineno - 1:member.end_lineno]))
        elif isinstance(member, ast.FunctionDef) and (not member.name.startswith("_") or member.name in ("__init__", "__call__")): parts.append("\n" + head(lines, member) + said(member, "    "))
    return "\n".join(parts)


def reference(folder: Path) -> list[str]:
    "A page for each module: what it exports, as it is written there."
    names = []
    for file in sorted((ROOT / "clip_lab").rglob("*.py")):
        if file.name in ("_modidx.py", "__init__.py"): continue
        text = file.read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
        defined = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public]
        if not defined: continue
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        source = re.search(r"File to edit: (?:\.\./)+(nbs/\S+?\.ipynb)", text)
        about = ast.get_docstring(tree) or ""
        body = "".join(f"\n## {n.name}\n\n{ast.get_docstring(n) or ''}\n\n```python\n{described(lines, n)}\n```\n" for n in defined)
        (folder / f"{name}.md").write_text(f"# {name}\n\n{about}\n" + (f"\nWritten in [{source[1]}](../{source[1]}).\n" if source else "") + body, encoding="utf-8")
        names.append(name)
    return names


def stage(src: Path, only: str | None) -> int:
    "Everything that becomes a page, in the layout of the repository, so that links between files hold."
    if src.exists(): shutil.rmtree(src)
    (src / "api").mkdir(parents=True)
    toc = []
    for title, patterns in FLOORS.items():
        pages = [f for pattern in patterns for f in sorted(ROOT.glob(pattern)) if only is None or str(f.relative_to(ROOT)).startswith(only)]
        for file in pages:
            there = src / file.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(prepare(file), there)
        if pages: toc.append((title, [str(f.relative_to(ROOT).with_suffix("")) for f in pages]))
    for file in [ROOT / p for p in PAGES if (ROOT / p).exists()] + sorted((ROOT / "nbs" / "images").glob("*")) + [ROOT / "LICENSE-DATA"]:
        there = src / file.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, there)
    toc.append(("Reference", [f"api/{name}" for name in reference(src / "api")]))
    toc.append(("About", [str(Path(p).with_suffix("")) for p in PAGES if (ROOT / p).exists()]))
    tree = "".join(f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n:maxdepth: 1\n\n" + "\n".join(pages) + "\n```\n" for title, pages in toc)
    (src / "index.md").write_text((ROOT / "README.md").read_text(encoding="utf-8") + tree, encoding="utf-8")
    return sum(len(pages) for _, pages in toc) + 1


def check(html: Path) -> tuple[list[str], int, int]:
    "What is wrong with the pages, how many links inside the site were followed, and how many lead out of it."
    trees = {f: BeautifulSoup(f.read_text(encoding="utf-8"), "html.parser") for f in sorted(html.rglob("*.html"))}
    ids = {f: {e["id"] for e in t.find_all(id=True)} | {e["name"] for e in t.find_all("a", attrs={"name": True})} for f, t in trees.items()}
    wrong, inside, outside = [], 0, 0
    for file, tree in trees.items():
        where = file.relative_to(html)
        wrong += [f"{where}: a picture without alt text ({i.get('src', '')[:60]})" for i in tree.find_all("img") if not (i.get("alt") or "").strip() or i["alt"].startswith("_images/") or i["alt"] == i.get("src")]
        for link in tree.find_all("a", href=True):
            url, anchor = urldefrag(link["href"])
            if re.match(r"[a-z]+:", url): outside += 1; continue
            inside += 1
            target = (file.parent / unquote(url)).resolve() if url else file
            if not target.exists(): wrong.append(f"{where}: dead link {link['href']}")
            elif anchor and target in ids and unquote(anchor) not in ids[target]: wrong.append(f"{where}: no place {link['href']}")
    return wrong, inside, outside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    parser.add_argument("--only", help="only notebooks whose path begins so, to look at one of them quickly")
    args = parser.parse_args()
    from sphinx.cmd.build import build_main
    pages = stage(args.out / "src", args.only)
    html = args.out / "html"
    warnings = args.out / "warnings.txt"
    failed = build_main(["-q", "-j", "2", "-b", "html", "-c", str(ROOT / "docs"), "-d", str(args.out / "trees"), "-w", str(warnings), str(args.out / "src"), str(html)])
    said = [re.sub(r"^.*/src/", "", line) for line in warnings.read_text().splitlines() if line.strip()] if warnings.exists() else []
    wrong, inside, outside = check(html)
    for line in [*said, *wrong]: print(line, file=sys.stderr)
    print(f"{html / 'index.html'}: {pages} pages, {inside:,} links inside the site followed, {outside:,} lead elsewhere and were not; {len(said)} warnings, {len(wrong)} faults")
    return int(bool(failed or args.only is None and (said or wrong)))


if __name__ == "__main__":
    sys.exit(main())
