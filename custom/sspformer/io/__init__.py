"""Files in and out: NIfTI and DICOM."""

from .dicom_in import DicomStack, quiet_dicom, read_dicom, read_stack
from .dicom_out import (
    STRUCTURE_CODES,
    SaveImageDicomd,
    SaveSegmentationDicomd,
    image_to_dicom,
    import_highdicom,
    segmentation_to_dicom,
)
from .errors import Unusable
from .files import digest, output_path, replacing, sha256, stats, stem, write_atomically
from .load import LoadScand, files_of, is_series
from .nifti import SaveLikeInputd, read_nifti, save_like
from .ownership import leave_folder, own_folder
from .tables import format_table, write_csv
