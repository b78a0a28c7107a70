"""From a folder of scans, whatever it holds, to datalists that are checked and split by subject.

A data set (``dataset_dir``) is one of these:

- a folder, searched recursively for NIfTI files and DICOM series; an ``imagesTs/`` in it is the test split;
- for label maps: a folder with ``images/`` and ``labels/``, or nnU-Net's ``imagesTr/`` and ``labelsTr/`` (and
  ``imagesTs/`` with ``labelsTs/`` as the test split), in which an image and its label map have the same name;
- a datalist (JSON), or the folder that holds it as ``dataset.json``, with a list "training" and perhaps "validation"
  and "test", which then are the split. Paths are relative to its folder;
- a single file.

Four steps lead to the lists, each in a module of its own: ``find`` (which scans there are, and whose), ``check`` (each
is read once, to its end, because a truncated file or a NaN shows only there), ``split`` (by subject) and ``report``
(a table of the scans, and an error that names all unusable ones). ``prepare_datalist``, ``prepare_pairs``,
``prepare_test_scans`` and ``prepare_test_pairs`` run them; ``find_inputs`` finds the scans to infer from. A scan with a
label map goes the same way as one without.

No patient identity of a DICOM header reaches a name, a log or a file: a PatientID is used only through its hash.
"""

from .cache import CachedDataset, file_hashing
from .datalist import LazyDatalist, check_pairs, prepare_datalist, prepare_pairs, prepare_test_pairs, prepare_test_scans
from .device_loader import DeviceLoader, ScanBuffer
from .inputs import find_inputs
from .labels import class_names, class_weights
from .naming import is_label_path, subject_of
from .options import DatasetOptions
from .scan import Scan
from .targets import TargetOptions, prepare_targets, prepare_test_targets, target_classes
