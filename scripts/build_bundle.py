"""Build the MONAI Bundle as its users take it: dist/sspformer_mri_v<version of metadata.json>.zip.

    python scripts/build_bundle.py
    python scripts/build_bundle.py --unpacked /path/to/folder

The zip holds the folder sspformer_mri with configs, docs, models, LICENSE and, at its root, the package sspformer: it
runs with nothing of ours installed. The same commit gives the same bytes. In a git checkout the files that git tracks
are taken, as they are on disk (a new file needs ``git add``); in an unpacked source archive, or without git, all files
of these folders.
Prints size and SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "sspformer_mri"
#: folder or file in the bundle: where it is in the repository
PARTS = {
    **{name: f"bundle/{name}" for name in ("LICENSE", "configs", "docs", "models")},
    "sspformer": "custom/sspformer",
}
LARGEST = 25 * 1024**2  # bytes of a file in the Model Zoo


def git(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments, "-z", "--", *PARTS.values()], capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(
            f"error: git cannot list the files of {ROOT}; mend what it says, or build in a copy without .git, "
            f"where all files are taken: {done.stderr.strip()}"
        )
    return done.stdout.rstrip("\0").split("\0")


def bundle_files() -> dict[str, Path]:
    """Path in the zip: file on disk."""
    tracked = None
    if (ROOT / ".git").exists() and shutil.which("git") is None:
        print("warning: git is not installed: all files are taken, also those that it does not track.", file=sys.stderr)
    elif (ROOT / ".git").exists():
        tracked = {ROOT / path for path in git("ls-files")}
        changed = [entry for entry in git("status", "--porcelain", "--no-renames") if entry]
        if changed:
            print("uncommitted changes (files that git does not track, ??, are left out):", *changed, sep="\n  ")
    files = {}
    for target, source in PARTS.items():
        part = ROOT / source
        for path in [part] if part.is_file() else part.rglob("*"):
            hidden = any(name.startswith((".", "__pycache__")) for name in path.relative_to(ROOT).parts)
            if path.is_file() and not hidden and (tracked is None or path in tracked):
                files[(Path(NAME, target) / path.relative_to(part)).as_posix()] = path
    large = [
        f"{name}: {path.stat().st_size / 1024**2:.1f} MiB"
        for name, path in files.items()
        if path.stat().st_size > LARGEST
    ]
    if large:
        sys.exit(
            "error: the Model Zoo takes no file over 25 MiB; store weights in half precision "
            "(scripts/half_precision.py): " + ", ".join(large)
        )
    return files


def main(output_dir: Path = ROOT / "dist", unpacked: Path | None = None) -> Path:
    """Write the zip into ``output_dir``, and the folder into ``unpacked`` if given; return the zip's path."""
    if unpacked and (unpacked / NAME).exists():
        sys.exit(f"error: {unpacked / NAME} exists: remove it, or give --unpacked another folder.")
    files = bundle_files()
    version = json.loads((ROOT / "bundle/configs/metadata.json").read_text())["version"]
    target = output_dir / f"{NAME}_v{version}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # deflated bytes would depend on the zlib
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix, a file that all may read
            archive.writestr(entry, path.read_bytes())
    content = target.read_bytes()
    print(f"{target}: {len(content) / 1e6:.1f} MB, SHA-256 {hashlib.sha256(content).hexdigest()}")
    if unpacked:
        with zipfile.ZipFile(target) as archive:
            archive.extractall(unpacked)
        print(unpacked / NAME)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "dist", help="gets the zip (default: dist)")
    parser.add_argument("--unpacked", type=Path, help="a folder that gets the bundle as a folder, too")
    main(**vars(parser.parse_args()))
