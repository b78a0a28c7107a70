"""Files that are no NIfTI or DICOM: what they are by content or name, and what to do with them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_MGH = "convert it with FreeSurfer: mri_convert x.mgz x.nii.gz"
_SIMPLEITK = "convert it to NIfTI with SimpleITK or 3D Slicer"
_MINC = "convert it with mnc2nii, or with nibabel"
_ARRAY = "save it as NIfTI with nibabel and the affine of its scan"
_PHILIPS = "convert it with parrec2nii or dcm2niix"
_AFNI = "convert it with AFNI: 3dAFNItoNIFTI"
_UNPACK = "unpack it first"

#: how a file of any kind begins that must be unpacked or fetched first, in lower case
UNFINISHED = {
    b"bzh": f"compressed by bzip2: {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"compressed by zstandard (zst): {_UNPACK}",
    b"\xfd7zxz\0": f"compressed by xz: {_UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive: {_UNPACK}",
    b"<!doctype": "a web page (HTML), as a failed download leaves: download it again",
    b"<html": "a web page (HTML), as a failed download leaves: download it again",
    b"version https://git-lfs": "a Git LFS pointer without the file: git lfs pull",
    b"/annex/objects": "a git-annex pointer without the file: datalad get, or git annex get",
}

#: how a file begins that is no NIfTI, in lower case
BEGINNINGS = {
    **UNFINISHED,
    b"\x1f\x8b": "compressed by gzip: gunzip it, or name it .nii.gz if it is a NIfTI file",
    b"pk\x03\x04": f"a zip archive: {_UNPACK}",
    b"nrrd000": f"an NRRD file: {_SIMPLEITK}",
    b"objecttype": f"a MetaImage: {_SIMPLEITK}",
    b"\0\0\0\1\0\0": f"an MGH volume: {_MGH}",  # version 1, and a width of less than 65,536
    b"\x89hdf": f"an HDF5 or MINC file: {_MINC}",
    b"cdf\x01": f"a MINC file: {_MINC}",
    b"\x93numpy": f"a numpy array: {_ARRAY}",
}

#: how the name of a file ends
ENDINGS = {
    (".mgz", ".mgh"): _MGH,
    (".nrrd", ".nhdr", ".mha", ".mhd"): _SIMPLEITK,
    (".mnc", ".mnc.gz"): _MINC,
    (".npy", ".npz"): _ARRAY,
    (".par", ".rec"): _PHILIPS,
    (".head", ".brik", ".brik.gz"): _AFNI,
    (".dcm.gz", ".ima.gz", ".hdr.gz", ".img.gz"): "gunzip it first",
    (".nii.bz2", ".nii.xz", ".nii.zst", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tar.gz", ".tar.bz2"): _UNPACK,
}

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def foreign_content(head: bytes) -> str:
    """What a file is that begins so, and what to do; empty if it may be NIfTI, or if that is unknown."""
    if head[128:132] == b"DICM":
        return "a DICOM file: rename it to .dcm"
    return next((what for start, what in BEGINNINGS.items() if head.lower().startswith(start)), "")


def foreign_name(name: str) -> str:
    """What a file with this name is, and what to do; empty if the name does not say."""
    known = ((ending, action) for endings, action in ENDINGS.items() for ending in endings)
    return next((f"a {ending} file: {action}" for ending, action in known if name.lower().endswith(ending)), "")


def no_file(path: Path) -> str:
    """What lies at a path that is no regular file, so that it must not be opened; empty if it is one.

    Raises:
        OSError: when there is nothing, or it may not be looked at.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind == stat.S_IFDIR:
        os.scandir(path).close()  # raises if it is closed
        return "a folder, not a file"
    return "" if kind == stat.S_IFREG else f"{_KINDS.get(kind, 'something else')}, not a file"
