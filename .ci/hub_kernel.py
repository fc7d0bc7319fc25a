"""Lay out the losses as a repository of Hugging Face's kernel hub.

    python .ci/hub_kernel.py FOLDER
    kernels.get_local_kernel(FOLDER).adaptive_kl(student_logits, teacher_logits)

The layout is that of a kernel without compiled parts, which `kernels` loads from a path, under a
name that is unique to its contents:

    FOLDER/README.md, LICENSE
    FOLDER/build/torch-universal/metadata.json, __init__.py, ..., kernels/

A kernel may import the standard library, torch and Triton, and itself by relative imports.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the package, what `import akl_triton` and the losses need: its modules but for these, which
# belong to `akl-triton check`, the tests and stored teachers, and none of its subpackages but the
# kernels.
LEFT_OUT = {"offline.py", "reference.py", "verify.py"}
CARD = """---
license: apache-2.0
tags:
  - kernels
---

# akl-triton

The losses of akl-triton {version} for the `kernels` library: `get_kernel(REPOSITORY,
version={major})` returns what `import akl_triton` does, without the command line, the integrations,
stored teachers and the extras.
"""


def sources() -> dict[str, Path]:
    """The files of the variant, by their paths in it."""
    package = {path.name: path for path in sorted((ROOT / "akl_triton").glob("*.py"))}
    kernels = {f"kernels/{path.name}": path for path in sorted((ROOT / "kernels").glob("*.py"))}
    return {name: path for name, path in package.items() if name not in LEFT_OUT} | kernels


def build(folder: Path) -> None:
    """Write the repository to a folder that does not exist yet, or anew where it wrote before."""
    variant = folder / "build" / "torch-universal"
    if folder.exists():
        if not (variant / "metadata.json").exists():
            raise FileExistsError(f"{folder}: expected a new folder, or one of an earlier build")
        shutil.rmtree(folder)
    files = sources()
    (variant / "kernels").mkdir(parents=True)
    digest = hashlib.sha256()
    for name, path in files.items():
        shutil.copyfile(path, variant / name)
        digest.update(name.encode() + b"\0" + path.read_bytes())
    found = re.search(r'^__version__ = "(.+)"', files["__init__.py"].read_text("utf-8"), re.M)
    assert found is not None
    version = found[1]
    major = int(version.split(".")[0])
    metadata = {
        "id": f"_akl_triton_{digest.hexdigest()[:12]}",  # the name under which it is imported
        "name": "akl-triton",
        "version": major,
        "kernels-minver": "0.17.2",  # the version that this was tested with
        "license": "Apache-2.0",
        "python-depends": [],
        # Metadata has to name one. It matters for architectures alone, of which none is listed.
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(CARD.format(version=version, major=major), "utf-8")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
