"""The tie into MONAI's engines: batches, inferers, handlers, checkpoints, panels, reports."""

from .checkpoints import (
    LoadCheckpoint,
    SaveBestModel,
    SaveCheckpoint,
    SaveEncoder,
    StrictCheckpointLoader,
    find_checkpoint,
    save_atomically,
    save_network,
)
from .checks import check_options, check_settings, check_sides
from .distributed import join_processes, leave_processes, local_device, of_this_process, process_rank
from .handlers import FreezeEncoder, GradientClipping, Progress, SeedEpoch, Validation
from .history import History
from .inference import InferenceDataset, InferenceEvaluator, InferenceReport, ResultWriter, ScansFailed, mark_done
from .inferers import AutocastInferer, AutocastSlidingWindowInferer, fast_bfloat16
from .optimizers import layer_decay_groups, warmup_cosine, weight_decay_groups
from .panels import Panel, ReconstructionPanel, RestorationPanel, SavePNGd, SegmentationPanel
from .postprocessing import Reconstruct, unpack_targets
from .predictions import (
    PredictionPanel,
    PredictionReport,
    PredictionTable,
    PrepareTargetBatch,
    SavePredictiond,
    standardize_head,
)
from .prepare_batch import PrepareBatchOnDevice, PrepareDegradedBatch, PrepareMaskedBatch
from .report import EvaluationReport
from .train_step import TrainStep
