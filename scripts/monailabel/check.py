"""Ask a real MONAI Label server with this bundle, beside two others, what 3D Slicer and OHIF ask; check the answers.

    scripts/monailabel/setup.sh VENV
    VENV/bin/python scripts/monailabel/check.py

The bundle is built from the repository and runs from its folder alone. Beside it stand the bundle that
overlay_bundle.py makes of the hippocampus weights (the same package a second time) and a UNet of random weights with a
package called "scripts", like those of the Model Zoo. Requests go through the client of 3D Slicer's own module, which
the MONAI Label wheel carries. Where Orthanc with its DICOMweb plugin is installed (Debian: apt-get install orthanc
orthanc-dicomweb), a second server takes its images from there, and is asked what OHIF asks; else that is skipped.

The scan is the average head that nilearn carries, or SCAN; for OHIF it is the head as a DICOM series. MONAI Label's
servers listen on 127.0.0.1 alone. Orthanc 1.10 has no such setting: it listens on every address while the check runs,
on a port drawn by chance, and answers to 127.0.0.1 alone (RemoteAccessAllowed). It holds nothing but that head. Nothing
is asked of the network. Prints PASS, FAIL and SKIP lines; some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests
import SimpleITK as sitk
import torch

ROOT = Path(__file__).resolve().parents[2]
OURS, HIPPOCAMPUS, FOREIGN = "sspformer_mri", "sspformer_hippocampus", "unet_mri"
SLICER_CLIENT = Path(sys.prefix, "monailabel/plugins/slicer/MONAILabel/MONAILabelLib/client.py")
ORTHANC_PLUGINS = Path("/usr/share/orthanc/plugins")
count = {"PASS": 0, "FAIL": 0, "SKIP": 0}


def say(status: str, what: str, detail: Any = "") -> None:
    count[status] += 1
    print(f"{status}  {what}" + (f": {' '.join(str(detail).split())[:400]}" if str(detail) else ""), flush=True)


def expect(ok: bool, what: str, detail: Any = "") -> bool:
    say("PASS" if ok else "FAIL", what, detail)
    return bool(ok)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """What raises is a FAIL, and the next step follows."""
    try:
        yield
    except Exception as error:
        say("FAIL", what, getattr(error, "msg", None) or f"{type(error).__name__}: {error}")


# --- bundles, scans, servers


def make_foreign_bundle(folder: Path) -> None:
    """A bundle as others make them: a UNet of random weights, stock transforms, and a package called scripts."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "scripts").mkdir()
    (folder / "scripts/__init__.py").write_text("from .own import Brightend\n")
    (folder / "scripts/own.py").write_text(
        "from monai.transforms import MapTransform\n\n\nclass Brightend(MapTransform):\n    def __call__(self, data):\n"
        "        return {**data, **{key: data[key] + 1 for key in self.keys}}\n"
    )
    network = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}
    preprocessing = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
        {"_target_": "NormalizeIntensityd", "keys": "image"},
        {"_target_": "scripts.Brightend", "keys": "image"},
    ]
    config = {
        "imports": ["$import scripts"],
        "bundle_root": ".",
        "device": "cpu",
        "network_def": {"_target_": "UNet", **network},
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [96, 96, 96]},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            ],
        },
    }
    pred = {"channel_def": {"0": "background", "1": "bright"}}
    metadata = {"version": "0.0.1", "network_data_format": {"inputs": {"image": {}}, "outputs": {"pred": pred}}}
    (folder / "configs/inference.json").write_text(json.dumps(config))
    (folder / "configs/metadata.json").write_text(json.dumps(metadata))
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    torch.save(UNet(**network).state_dict(), folder / "models/model.pt")


def average_head() -> tuple[np.ndarray, np.ndarray]:
    """The MNI152 template, int16, 1 mm, with its affine."""
    from nilearn.datasets import load_mni152_template

    head = load_mni152_template(resolution=1)
    return np.rint(head.get_fdata() * 1000).astype(np.int16), head.affine


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], url: str, log: Path, environment: Mapping[str, str], seconds: int = 180) -> Iterator:
    """A server that answers at the url, in a process group of its own, which is ended."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, cwd=log.parent, start_new_session=True
        )
    try:
        begin = time.monotonic()
        while time.monotonic() - begin < seconds and process.poll() is None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(url, timeout=5).ok:
                    break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"no answer at {url}; the end of {log}:\n{log.read_text()[-2000:]}")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def label_server(work: Path, studies: str, models: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(work / "apps/monaibundle")]
    command += ["--studies", studies, "--host", "127.0.0.1", "--port", str(port), "--conf", "models", ",".join(models)]
    command += ["--conf", "zoo_source", "ngc", "--conf", "sam2", "false"]
    with running(command, f"{url}/info/", work / f"server_{port}.log", environment):
        yield url


def slicer_client(url: str, folder: Path):
    spec = importlib.util.spec_from_file_location("slicer_client", SLICER_CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MONAILabelClient(url, tmpdir=str(folder))


def options(info: Mapping, section: str, model: str) -> dict[str, Any]:
    """All options as Slicer's module sends them (MONAILabelWidget.getParamsFromConfig): the first of each choice."""
    return {k: v[0] if isinstance(v, list) else v for k, v in info[section][model]["config"].items()}


def same_grid(a: sitk.Image, b: sitk.Image) -> bool:
    """The same voxels in the patient, as far as float32 headers say."""
    numbers = [[*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()] for image in (a, b)]
    return a.GetSize() == b.GetSize() and np.allclose(*numbers, atol=1e-3)


def voxels(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def own_run(bundle: Path, scan: Path, folder: Path, environment: Mapping[str, str]) -> sitk.Image:
    """The label that the bundle's own command writes."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(bundle / "configs/inference.json")]
    command += ["--bundle_root", str(bundle), "--dataset_dir", str(scan), "--output_dir", str(folder)]
    subprocess.run(command, env=environment, cwd=folder.parent, check=True, capture_output=True, text=True)
    return sitk.ReadImage(str(next(folder.glob("*_seg.nii.gz"))))


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return torch.load(bundle / "models/model.pt", map_location="cpu", weights_only=True)


def training(url: str, seconds: int) -> tuple[str, str]:
    """Waits for the training that runs; its status and what it said, of which the server keeps the end."""
    said, deadline = {}, time.monotonic() + seconds
    while time.monotonic() < deadline:
        task = requests.get(f"{url}/train/", timeout=60).json()
        said.update(dict.fromkeys(task.get("details") or []))
        if task["status"] not in ("SUBMITTED", "RUNNING"):
            return task["status"], "\n".join(said)
        time.sleep(1)
    requests.delete(f"{url}/train/", timeout=60)
    return "STOPPED", "\n".join(said)


# --- what is checked


def check_slicer(work: Path, scan: Path, environment: Mapping[str, str]) -> None:
    """Info, inference, sessions, uploads, labels and training, as the module of 3D Slicer asks for them."""
    bundle, studies = work / "apps/monaibundle/model" / OURS, work / "studies"
    studies.mkdir()
    shutil.copy(scan, studies / "head.nii.gz")
    image = sitk.ReadImage(str(scan))
    with label_server(work, str(studies), [OURS, FOREIGN, HIPPOCAMPUS], environment) as url:
        client = slicer_client(url, work)
        info = client.info()
        expect(set(info["models"]) == {OURS, FOREIGN, HIPPOCAMPUS}, "info lists three bundles", list(info["models"]))
        expect(set(info["trainers"]) == {OURS, HIPPOCAMPUS}, "and two trainers", list(info["trainers"]))
        metadata = json.loads((bundle / "configs/metadata.json").read_text())
        classes = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        wanted = {name.lower(): int(i) for i, name in classes.items() if i != "0"}
        ours = info["models"][OURS]
        expect(ours["labels"] == wanted, "labels are those of metadata.json", f"{len(ours['labels'])} structures")
        expect((ours["type"], ours["version"]) == ("segmentation", metadata["version"]), "type and version")

        def infer(model: str, image_id: str = "", session_id: str | None = None) -> sitk.Image:
            # as MONAILabelLogic.infer of Slicer's module
            params = options(info, "models", model) | {"result_extension": ".nrrd", "result_dtype": "uint8"}
            file, result = client.infer(model, image_id, params, session_id=session_id)
            if result["label_names"] != info["models"][model]["labels"]:
                raise ValueError(f"label_names are {result['label_names']}")
            return sitk.ReadImage(file)

        with step("inference on an image of the datastore"):
            expect(client.next_sample("first", {})["id"] == "head", "next sample is the scan")
            label = infer(OURS, "head")
            found = np.unique(voxels(label)).tolist()
            expect(same_grid(label, image), "the label has the scan's own grid", label.GetSize())
            expect(label.GetPixelID() == sitk.sitkUInt8 and set(found) <= {0, *wanted.values()}, "its values", found)
            expect(len(found) > len(wanted) // 2, "it is not empty", f"{np.count_nonzero(voxels(label))} voxels")
            own = own_run(bundle, scan, work / "own", environment)
            expect(same_grid(own, label) and (voxels(own) == voxels(label)).all(), "it is the bundle's own label")
        with step("a session, as for a volume that is open in Slicer"):
            session = client.create_session(str(scan))["session_id"]
            again = infer(OURS, session_id=session)
            expect((voxels(again) == voxels(label)).all() and same_grid(again, image), "session: the same label")
            client.remove_session(session)
        with step("the forms of output"):
            url_of = f"{url}/infer/{OURS}?image=head&output="
            answers = {form: requests.post(url_of + form, timeout=600) for form in ("image", "json", "all")}
            (work / "answer.nii.gz").write_bytes(answers["image"].content)
            nifti, of_scan = nib.load(work / "answer.nii.gz"), nib.load(scan)
            same = nifti.get_data_dtype() == np.uint8 and np.allclose(nifti.affine, of_scan.affine, atol=1e-3)
            expect(same and (np.asarray(nifti.dataobj).T == voxels(label)).all(), "output=image: the label as NIfTI")
            expect(answers["json"].json()["label_names"] == wanted, "output=json: the names")
            kind = answers["all"].headers["content-type"]
            expect(answers["all"].ok and kind.startswith("multipart/form-data"), "output=all: both", kind)
        with step("the same image with other axes, uploaded"):
            axes = nib.orientations.axcodes2ornt(("P", "I", "R"))
            turn = nib.orientations.ornt_transform(nib.io_orientation(of_scan.affine), axes)
            nib.save(of_scan.as_reoriented(turn), work / "turned.nii.gz")
            client.upload_image(str(work / "turned.nii.gz"), "turned")
            turned = infer(OURS, "turned")
            expect(same_grid(turned, sitk.ReadImage(str(work / "turned.nii.gz"))), "the label has the turned grid")
            back = sitk.Resample(turned, label, sitk.Transform(), sitk.sitkNearestNeighbor)
            share = float((voxels(back) == voxels(label)).mean())
            expect(share > 0.999, "it is the same label", f"{share:.4%} of the voxels")
        with step("the other bundles"):
            foreign = infer(FOREIGN, "head")
            expect(same_grid(foreign, image) and voxels(foreign).any(), "the UNet with its package scripts infers")
            where = np.argwhere(np.isin(voxels(label).T, ours["labels"]["hippocampus"]))
            where = where[where[:, 0] < np.median(where[:, 0])]  # one of the two
            low, high = np.maximum(where.min(0) - 8, 0), where.max(0) + 9
            nib.save(of_scan.slicer[tuple(map(slice, low, high))], work / "crop.nii.gz")
            client.upload_image(str(work / "crop.nii.gz"), "crop")
            crop = infer(HIPPOCAMPUS, "crop")
            whole = sitk.Resample(label, crop, sitk.Transform(), sitk.sitkNearestNeighbor)
            both = [voxels(crop) > 0, voxels(whole) == ours["labels"]["hippocampus"]]
            dice = 2 * np.logical_and(*both).sum() / sum(mask.sum() for mask in both)
            expect(dice > 0.5, "the hippocampus bundle finds what the first one calls so", f"Dice {dice:.2f}")
            expect((voxels(infer(OURS, "head")) == voxels(label)).all(), "and the first infers as before")
        requests.delete(f"{url}/datastore/image?id=crop", timeout=60)

        # an annotator saves labels; Slicer writes whatever type its label map has
        names = [{"name": name, "idx": i} for name, i in wanted.items()]

        def save(image_id: str, of: sitk.Image, kind: int, values: range) -> None:
            kept = sitk.GetImageFromArray(np.where(np.isin(voxels(of), values), voxels(of), 0))
            kept.CopyInformation(of)
            sitk.WriteImage(sitk.Cast(kept, kind), str(work / "label.nii.gz"))
            client.save_label(image_id, str(work / "label.nii.gz"), params={"label_info": names})

        def train(**changes) -> tuple[str, str]:
            client.train_start(OURS, options(info, "trainers", OURS) | changes)
            return training(url, 1200)

        with step("training on two labels"):
            before = weights(bundle)
            save("head", label, sitk.sitkUInt8, range(99))
            save("turned", turned, sitk.sitkInt16, range(12))
            status, said = train(max_epochs=2)
            expect(status == "DONE" and said.count("epoch 2/2") == 1, "training ends, once", said.splitlines()[-1])
            after = weights(bundle)
            finite = before.keys() == after.keys() and all(value.isfinite().all() for value in after.values())
            expect(finite, "models/model.pt is whole and finite")
            moved = max((after[n].float() - v.float()).abs().max().item() for n, v in before.items())
            expect(0 < moved < 0.1, "it went on from the weights of before", f"largest change {moved:.2g}")
            refined = infer(OURS, "head")
            own = own_run(bundle, scan, work / "trained", environment)
            expect((voxels(refined) == voxels(own)).all(), "the next inference uses it")
            changed = float((voxels(refined) != voxels(label)).mean())
            expect(0 < changed < 0.02, "and little has changed", f"{changed:.3%} of the voxels")
        with step("training again, with a third label and one that was saved anew"):
            shutil.copy(work / "turned.nii.gz", studies / "third.nii.gz")
            time.sleep(2)  # the datastore watches its folder
            save("turned", turned, sitk.sitkFloat32, range(99))
            save("third", turned, sitk.sitkUInt8, range(99))
            status, said = train(max_epochs=1)
            expect(status == "DONE", "it trains on two and validates on the third", said.splitlines()[-1])
            dice = [line for line in said.splitlines() if "epoch 1/1" in line and "dice" in line]
            expect(len(dice) == 1, "with a Dice of the held-out label", dice[0].split(" - ")[-1] if dice else said)
        with step("a label map that does not fit"):
            save("third", turned + 20, sitk.sitkUInt8, range(99))
            status, _ = train(max_epochs=1)
            said = (work / f"server_{url.rpartition(':')[2]}.log").read_text()  # the answer has the last lines alone
            told = said[said.rfind("\nValueError: ") :]
            expect(status == "ERROR" and "third.nii.gz: " in told and "unknown values 20" in told, "is refused", told)


def has_orthanc() -> bool:
    return bool(shutil.which("Orthanc") and (ORTHANC_PLUGINS / "libOrthancDicomWeb.so").exists())


@contextlib.contextmanager
def ohif_servers(work: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, str, list[Path]]]:
    """Orthanc with the head as a DICOM series, and MONAI Label with OHIF; both addresses and the series' files."""
    from sspformer.demo import write_series

    image, affine = average_head()
    write_series(work / "series", "average head", image[:, :, ::2], affine @ np.diag([1, 1, 2, 1]))
    files = sorted((work / "series").glob("*.dcm"))
    port = free_port()
    config = {
        **{"Name": "check", "HttpPort": port, "RemoteAccessAllowed": False, "DicomServerEnabled": False},
        **{"StorageDirectory": str(work / "orthanc"), "IndexDirectory": str(work / "orthanc")},
        **{"Plugins": [str(ORTHANC_PLUGINS / "libOrthancDicomWeb.so")], "DicomWeb": {"Enable": True}},
    }
    (work / "orthanc.json").write_text(json.dumps(config))
    store = f"http://127.0.0.1:{port}"
    with running(["Orthanc", str(work / "orthanc.json")], f"{store}/system", work / "orthanc.log", environment):
        for file in files:
            requests.post(f"{store}/instances", data=file.read_bytes(), timeout=60).raise_for_status()
        environment = {
            **environment,
            "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": '{"Modality": "MR"}',  # CT by default
            "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(work / "dicom_cache"),
        }
        with label_server(work, f"{store}/dicom-web", [OURS], environment) as url:
            yield url, store, files


def check_ohif(work: Path, environment: Mapping[str, str]) -> None:
    """Inference on a DICOM series of a DICOMweb server, and a label saved to it, as OHIF asks for them."""
    if not has_orthanc():
        return say("SKIP", "OHIF", "no Orthanc with its DICOMweb plugin: apt-get install orthanc orthanc-dicomweb")
    with ohif_servers(work, environment) as (url, store, files):
        series = requests.get(f"{store}/dicom-web/series", timeout=60).json()[0]["0020000E"]["Value"][0]
        expect("<html" in requests.get(f"{url}/ohif/", timeout=60).text.lower(), "the server brings OHIF")
        # as MonaiLabelClient.infer of OHIF's extension: a form with params
        params = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
        form = {"params": (None, json.dumps({**params, "restore_label_idx": False}))}
        answer = requests.post(f"{url}/infer/{OURS}?image={series}&output=image", files=form, timeout=600)
        answer.raise_for_status()
        (work / "answer.nrrd").write_bytes(answer.content)
        label = sitk.ReadImage(str(work / "answer.nrrd"))
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(files[0].parent)))
        expect(same_grid(label, reader.Execute()), "the label has the grid of the series", label.GetSize())
        own = own_run(work / "apps/monaibundle/model" / OURS, files[0].parent, work / "own_dicom", environment)
        own = sitk.Resample(own, label, sitk.Transform(), sitk.sitkNearestNeighbor)
        share = float((voxels(own) == voxels(label)).mean())
        expect(share > 0.999, "it is the bundle's own label", f"{share:.4%} of the voxels")

        found = [int(i) for i in np.unique(voxels(label)) if i]
        half = (voxels(label) > 0)[..., label.GetWidth() // 2 :].sum() / (voxels(label) > 0).sum()
        expect(len(found) == 17, "it has all structures", len(found))
        expect(0.45 < half < 0.55, "half of it is on one side of the head", f"{half:.1%}")
        names = [{"name": f"label {i}", "model_name": OURS} for i in found]
        form = {"params": (None, json.dumps({"label_info": names}))}
        answer = requests.post(f"{url}/infer/{OURS}?image={series}&output=dicom_seg", files=form, timeout=600)
        check_seg(answer.content, len(found), len(files), "output=dicom_seg: the label as DICOM SEG")
        # as MonaiLabelClient.save_label: the voxels alone
        form["label"] = ("label.bin", voxels(label).tobytes())
        requests.put(f"{url}/datastore/label?image={series}", files=form, timeout=600).raise_for_status()
        segs = requests.post(f"{store}/tools/find", json={"Level": "Instance", "Query": {"Modality": "SEG"}})
        stored = requests.get(f"{store}/instances/{segs.json()[0]}/file", timeout=60).content
        check_seg(stored, len(found), len(files), "a label saved by OHIF is on the DICOMweb server")
        kept = next(Path(work / "dicom_cache").rglob("labels/final/*.nii.gz"))
        same = (voxels(sitk.ReadImage(str(kept))) == voxels(label)).all()
        expect(same and same_grid(sitk.ReadImage(str(kept)), label), "training would find it on the image's grid")
        # as MonaiLabelClient.run_train: all trainers, their options by name
        train = options(requests.get(f"{url}/info/", timeout=60).json(), "trainers", OURS) | {"max_epochs": 1}
        requests.post(f"{url}/train/", json={OURS: train}, timeout=60).raise_for_status()
        status, said = training(url, 1200)
        expect(status == "DONE", "it trains on it", said.splitlines()[-1])


def check_seg(content: bytes, n_segments: int, n_slices: int, what: str) -> None:
    import io

    import pydicom

    seg = pydicom.dcmread(io.BytesIO(content))
    ok = seg.Modality == "SEG" and len(seg.SegmentSequence) == n_segments and seg.NumberOfFrames >= n_slices
    expect(ok, what, f"{len(seg.SegmentSequence)} segments, {seg.NumberOfFrames} frames")


@contextlib.contextmanager
def workplace(keep: Path | None, bundle: Path | None, device: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with the monaibundle app and our bundle in it, and the environment of the servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and end the servers
    if not SLICER_CLIENT.is_file():
        sys.exit(f"error: no {SLICER_CLIENT}: run this with the Python of setup.sh's environment.")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp"), prefix="label_check_") as folder:
        work = Path(folder)
        if keep:
            work = keep.absolute()
            work.mkdir(parents=True)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(work / "tmp")}
        environment |= {"HF_HUB_OFFLINE": "1", "MONAI_LABEL_SESSION_PATH": str(work / "sessions")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # itkimage2segimage
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        (work / "tmp").mkdir()
        models = work / "apps/monaibundle/model"
        app = [sys.executable, "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle"]
        subprocess.run([*app, "--output", str(work / "apps")], env=environment, check=True, capture_output=True)
        models.mkdir(exist_ok=True)
        if bundle:
            shutil.copytree(bundle, models / OURS)
        else:
            build = [sys.executable, str(ROOT / "scripts/build_bundle.py"), "--output_dir", str(work / "dist")]
            subprocess.run([*build, "--unpacked", str(models)], check=True)
        sys.path.insert(0, str(models / OURS))
        yield work, environment


def main(scan: Path | None, bundle: Path | None, keep: Path | None, device: str) -> int:
    with workplace(keep, bundle, device) as (work, environment):
        models = work / "apps/monaibundle/model"
        overlay = [sys.executable, str(ROOT / "scripts/overlay_bundle.py"), str(models / OURS), "hippocampus"]
        subprocess.run([*overlay, str(models / HIPPOCAMPUS)], check=True, capture_output=True)
        make_foreign_bundle(models / FOREIGN)
        if scan is None:
            scan = work / "scan.nii.gz"
            nib.save(nib.Nifti1Image(*average_head()), scan)
        for check in (lambda: check_slicer(work, scan, environment), lambda: check_ohif(work, environment)):
            with step("servers"):
                check()
    print(f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped")
    return 1 if count["FAIL"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path, nargs="?", help="T1 head, NIfTI (default: the MNI152 template)")
    parser.add_argument("--bundle", type=Path, help="the unpacked bundle (default: built from the repository)")
    parser.add_argument("--keep", type=Path, help="new folder that keeps logs, labels and the trained weights")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sys.exit(main(**vars(parser.parse_args())))
