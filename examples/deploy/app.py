"""A MONAI Deploy app: a DICOM series of a T1 head in, a DICOM SEG of its structures and a text SR of their volumes out.

    python examples/deploy -i /path/to/dicom -o /path/to/results -m /path/to/sspformer_mri

The model is the unpacked bundle, or a folder that holds it. Structures are named by its metadata. Research only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application, Image, IOType, Operator, OperatorSpec
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from monai.deploy.operators.dicom_text_sr_writer_operator import DICOMTextSRWriterOperator
from monai.deploy.operators.dicom_utils import ModelInfo
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)

#: the first MR series of each study
RULES = json.dumps({"selections": [{"name": "MR", "conditions": {"Modality": "^MR$"}}]})

CONFIGS = BundleConfigNames("deploy_preprocessing", "deploy_postprocessing", config_names=["inference", "deploy"])

SERIES, STUDIES = "study_selected_series_list", "dicom_study_list"


class SeriesToVolumeOperator(DICOMSeriesToVolumeOperator):
    """The SDK's operator, with an affine that also holds for pixels that are not square.

    PixelSpacing has the distance between rows first, and then that between columns. A step along a row is the second.
    SDK 4.0.0 takes the first.
    """

    def compute_affine_transform(self, s_1, s_n, n, series):
        super().compute_affine_transform(s_1, s_n, n, series)
        between_rows, between_columns = (float(value) for value in s_1[0x0028, 0x0030].value)
        for name in (self.ATTRIBUTE_DICOM_AFFINE, self.ATTRIBUTE_NIFTI_AFFINE):
            affine = getattr(series, name)
            affine[:3, 0] *= between_columns / between_rows
            affine[:3, 1] *= between_rows / between_columns


class VolumesOperator(Operator):
    """Volumes of the label map ``pred`` as ``text``, with a line for each structure."""

    def __init__(self, fragment, *args, names, **kwargs):
        self.names = names
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec):
        spec.input("pred")
        spec.output("text")

    def compute(self, op_input, op_output, context):
        pred = op_input.receive("pred")
        voxel = abs(np.linalg.det(np.asarray(pred.metadata()["original_affine"])[:3, :3])) / 1000  # ml
        counts = np.bincount(pred.asnumpy().ravel(), minlength=len(self.names) + 1)
        lines = [f"{name}: {count * voxel:.1f} ml" for name, count in zip(self.names, counts[1:])]
        op_output.emit("\n".join(["Volumes by a neural network. Research only.", *lines]), "text")


class SSPFormerApp(Application):
    """Reads the series, runs the bundle and writes its results."""

    def compose(self):
        context = Application.init_app_context(self.argv)
        found = sorted(Path(context.model_path).absolute().glob("**/configs/deploy.json"))
        if len(found) != 1:
            raise FileNotFoundError(f"-m {context.model_path} must hold one unpacked bundle, but holds {len(found)}.")
        bundle, output = found[0].parents[1], Path(context.output_path)
        context.models = None  # SDK 4.0.0 takes a folder for a model without weights
        sys.path.insert(0, str(bundle))
        from sspformer.data import class_names
        from sspformer.io.dicom_out import codes_of

        metadata = json.loads((bundle / "configs/metadata.json").read_text())
        title, version, names = metadata["name"], metadata["version"], class_names(bundle)
        segments = [SegmentDescription(name[:64], *codes_of(name), title[:64], version) for name in names]
        about = {
            "model_info": ModelInfo(metadata["authors"], title, version),
            "custom_tags": {"SeriesDescription": f"{title}. Research only."},
        }
        bundle_options = {
            "app_context": context,
            "bundle_path": bundle,
            "bundle_config_names": CONFIGS,
            "input_mapping": [IOMapping("image", Image, IOType.IN_MEMORY)],
            "output_mapping": [IOMapping("pred", Image, IOType.IN_MEMORY)],
        }

        load = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=context.input_path, name="load")
        select = DICOMSeriesSelectorOperator(self, rules=RULES, name="select")
        to_volume = SeriesToVolumeOperator(self, name="to_volume")
        infer = MonaiBundleInferenceOperator(self, name="infer", **bundle_options)
        measure = VolumesOperator(self, names=names, name="measure")
        seg = DICOMSegmentationWriterOperator(
            self, segment_descriptions=segments, output_folder=output, name="seg", **about
        )
        sr = DICOMTextSRWriterOperator(self, output_folder=output, name="sr", **about)

        self.add_flow(load, select, {(STUDIES, STUDIES)})
        self.add_flow(select, to_volume, {(SERIES, SERIES)})
        self.add_flow(to_volume, infer, {("image", "image")})
        self.add_flow(infer, measure, {("pred", "pred")})
        self.add_flow(infer, seg, {("pred", "seg_image")})
        self.add_flow(measure, sr, {("text", "text")})
        for writer in (seg, sr):
            self.add_flow(select, writer, {(SERIES, SERIES)})
