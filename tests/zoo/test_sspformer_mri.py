"""The bundle's unit test in the Model Zoo's own form, for its ci/unit_tests: runs beside models/sspformer_mri."""

import os
import shutil
import sys
import tempfile
import unittest

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow
from parameterized import parameterized

BUNDLE_ROOT = os.path.abspath("models/sspformer_mri")
SMALL = {"bundle_root": BUNDLE_ROOT, "num_workers": 0, "crop_size": [32, 32, 32], "roi_size": [32, 32, 32]}
TWO_CLASSES = {"class_names": ["shell", "core"], "network_def#out_channels": 3}
SHORT = {"epochs": 1, "batch_size": 2, "crops_per_scan": 1, "val_fraction": 0.4}

TEST_CASE_PRETRAIN = [
    "pretrain",
    [],
    {"bundle_root": BUNDLE_ROOT, "num_workers": 0, "crop_size": [32, 32, 32], **SHORT},
]
TEST_CASE_PRETRAIN_2D = [
    "pretrain_2d",
    ["pretrain_2d.json"],
    {"bundle_root": BUNDLE_ROOT, "num_workers": 0, "crop_size": [48, 48], **SHORT},
]
TEST_CASE_PRETRAIN_WHOLE = [
    "whole_network",
    ["whole_network.json"],
    {"bundle_root": BUNDLE_ROOT, "num_workers": 0, "crop_size": [32, 32, 32], **SHORT},
]
TEST_CASE_SEGMENTATION = ["segmentation", [], TWO_CLASSES]
TEST_CASE_DENOISING = ["denoising", ["restoration.json", "denoising.json"], {}]
TEST_CASE_SUPER_RESOLUTION = ["super_resolution", ["restoration.json", "super_resolution.json"], {}]
#: with the weights that ship
TEST_CASE_INFER = [
    ["head", [], {}, "_seg"],
    ["hippocampus", ["hippocampus.json"], {}, "_seg"],
    ["denoising", ["restoration.json", "denoising.json"], {}, "_denoised"],
    ["super_resolution", ["restoration.json", "super_resolution.json"], {"factor": 2}, "_sr"],
]


def check_workflow(workflow, check_properties=True):
    workflow.initialize()
    if check_properties:
        missing = workflow.check_properties()
        if missing:
            raise ValueError(f"check properties for workflow failed: {missing}")
    workflow.run()
    workflow.finalize()


class TestSSPFormerMRI(unittest.TestCase):
    def setUp(self):
        sys.path = [BUNDLE_ROOT] + sys.path
        self.dataset_dir, self.output_dir = tempfile.mkdtemp(), tempfile.mkdtemp()
        random = np.random.default_rng(0)
        x, y, z = np.ogrid[-1:1:24j, -1:1:28j, -1:1:20j]
        radius = np.sqrt(x**2 + y**2 + z**2)
        label = (radius < 0.8).astype(np.uint8) + (radius < 0.4)
        for folder in ("images", "labels"):
            os.mkdir(os.path.join(self.dataset_dir, folder))
        for i in range(3):
            image = (300.0 * label + random.normal(100, 20, label.shape)).astype(np.int16)
            for folder, array in (("images", image), ("labels", label)):
                path = os.path.join(self.dataset_dir, folder, f"subject{i}.nii.gz")
                nib.save(nib.Nifti1Image(array, np.diag([-2.0, 2.0, 2.0, 1.0])), path)

    def tearDown(self):
        shutil.rmtree(self.dataset_dir)
        shutil.rmtree(self.output_dir)

    def workflow(self, workflow_type, configs, override):
        return ConfigWorkflow(
            workflow_type=workflow_type,
            config_file=[os.path.join(BUNDLE_ROOT, "configs", name) for name in configs],
            logging_file=os.path.join(BUNDLE_ROOT, "configs/logging.conf"),
            meta_file=os.path.join(BUNDLE_ROOT, "configs/metadata.json"),
            **{"dataset_dir": self.dataset_dir, "output_dir": self.output_dir, **override},
        )

    @parameterized.expand([TEST_CASE_PRETRAIN, TEST_CASE_PRETRAIN_2D, TEST_CASE_PRETRAIN_WHOLE])
    def test_pretrain_config(self, name, overlays, override):
        check_workflow(self.workflow("train", ["pretrain.json", *overlays], override))
        self.assertTrue(os.path.isfile(os.path.join(self.output_dir, "models/pretrained/encoder.pt")))

    @parameterized.expand([TEST_CASE_SEGMENTATION, TEST_CASE_DENOISING, TEST_CASE_SUPER_RESOLUTION])
    def test_train_eval_config(self, name, overlays, override):
        check_workflow(self.workflow("train", ["train.json", *overlays], {**SMALL, **SHORT, **override}))
        weights = os.path.join(self.output_dir, "models/model.pt")
        configs = ["train.json", *overlays, "evaluate.json"]
        check_workflow(self.workflow("evaluation", configs, {**SMALL, **override, "weights": weights}))
        with open(os.path.join(self.output_dir, "metrics.csv")) as file:
            self.assertGreater(len(file.readlines()), 3)  # a header, and a row a subject or a structure of it

    @parameterized.expand(TEST_CASE_INFER)
    def test_infer_config(self, name, overlays, override, postfix):
        path = os.path.join(self.dataset_dir, "images", "subject0.nii.gz")
        override = {**SMALL, "dataset_dir": path, **override}
        check_workflow(self.workflow("inference", ["inference.json", *overlays], override))
        scan, result = nib.load(path), nib.load(os.path.join(self.output_dir, f"subject0{postfix}.nii.gz"))
        factor = override.get("factor", 1)
        self.assertEqual(result.shape, tuple(factor * side for side in scan.shape))
        np.testing.assert_allclose(result.affine, scan.affine @ np.diag([1 / factor] * 3 + [1]), atol=1e-3)


if __name__ == "__main__":
    unittest.main()
