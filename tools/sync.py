"""Keep what is generated equal to its source: notebooks -> library, notebooks clean and with a kernel, nbs/index.ipynb -> README.md.

python tools/sync.py            writes them
python tools/sync.py --check    writes them and fails, naming each file, if anything changed
"""

import argparse
import hashlib
from pathlib import Path
import re
import sys

from execnb.nbio import read_nb, write_nb
import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from traitlets.config import Config

from notebooks import KERNEL, wanted

ROOT = Path(__file__).resolve().parent.parent


def snapshot() -> dict[Path, str]:
    files = [*ROOT.glob("clip_lab/**/*.py"), *ROOT.glob("nbs/**/*.ipynb"), ROOT / "README.md"]
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.exists() and ".ipynb_checkpoints" not in f.parts}


def write_kernels(files: list[Path]) -> None:
    "The same kernel in every notebook: JupyterLab asks for one each time that it opens a notebook without."
    for file in files:
        notebook = read_nb(file)
        if notebook.metadata.get("kernelspec") == KERNEL: continue
        notebook.metadata["kernelspec"] = KERNEL
        write_nb(notebook, file)


def write_readme() -> None:
    """README.md from the saved outputs of nbs/index.ipynb; `#| hide` drops a cell, `#| echo: false` its code."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [c for c in notebook.cells if not c.source.startswith("#| hide")]
    for cell in notebook.cells:
        if cell.source.startswith("#| echo: false"): cell.metadata["tags"] = ["no-input"]
    exporter = MarkdownExporter(preprocessors=[TagRemovePreprocessor(remove_input_tags={"no-input"}, enabled=True)],
                                config=Config(NbConvertBase=dict(display_data_priority=["text/markdown", "text/plain"])))
    text, _ = exporter.from_notebook_node(notebook)
    for here, there in (("](images/", "](nbs/images/"), ("](studies/", "](nbs/studies/"), ("](howto/", "](nbs/howto/"), ("](ten_minutes", "](nbs/ten_minutes"), ("](proof", "](nbs/proof"), ("](paper", "](nbs/paper"), ("](../", "](")): text = text.replace(here, there)
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    lines = re.sub(r"\n{3,}", "\n\n", lines)
    (ROOT / "README.md").write_text(f"<!-- Written from nbs/index.ipynb by tools/sync.py: edit that. -->\n\n{lines}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if anything had to be written")
    check = parser.parse_args().check
    before = snapshot()
    nbdev_export()
    nbdev_clean()
    write_kernels(wanted([]))
    write_readme()
    after = snapshot()
    changed = sorted(str(f.relative_to(ROOT)) for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    for name in changed: print(("out of date: " if check else "wrote ") + name)
    if check and changed: print("Run `make sync`, look at the changes and commit them.", file=sys.stderr)
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
