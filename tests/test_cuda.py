"""What can only be seen on a GPU: the same results as on the CPU, no waiting for the device, and a compiled step."""

import os

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor

from sspformer.data import DeviceLoader
from sspformer.engines import (
    AutocastSlidingWindowInferer,
    InferenceDataset,
    InferenceEvaluator,
    PrepareMaskedBatch,
    TrainStep,
)
from sspformer.losses import BalancedDiceCELoss, MaskedReconstructionLoss
from sspformer.networks import MaskedAutoencoder, SSPFormerDense, SSPFormerEncoder, SSPFormerRestorer, network_to_run
from sspformer.transforms import (
    BatchedBiasField,
    BatchedContrast,
    BatchedNoise,
    BatchedResolution,
    BatchedSkullStrip,
    CropSampler,
    InverseFrequencyMask,
    NoiseSampler,
)

#: the tests themselves can be tried on a CPU
DEVICE = os.environ.get("SSPFORMER_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU")
TINY = {"dim": 48, "depth": 2, "num_heads": 2, "patch_size": 8}


def scans(n=4, sides=(40, 36, 44)):
    rng = np.random.default_rng(0)
    for _ in range(n):
        image = torch.from_numpy(rng.random((1, *sides), dtype=np.float32)).half()
        label = torch.from_numpy(rng.integers(0, 3, (1, *sides), dtype=np.uint8))
        yield {"image": MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 2, 2, 1]))), "label": MetaTensor(label)}


def loader(device, **settings):
    settings = {"crop": CropSampler((32, 32, 32), scale=(0.8, 1.2), rotate=0.2, flip_prob=0.5), **settings}
    return DeviceLoader(Dataset(list(scans())), batch_size=4, device=device, keys=("image", "label"), **settings)


def test_crops_are_those_of_the_cpu():
    made = loader(DEVICE)
    made.prepare()
    buffer = made._buffer
    index = torch.arange(4, device=DEVICE)
    matrix = made.crop(buffer.shape[index], buffer.spacing[index], torch.Generator(DEVICE).manual_seed(1))
    on_device = {name: value.cpu() for name, value in buffer.crops(index, matrix, made.crop.size).items()}
    on_cpu = buffer.to("cpu").crops(index.cpu(), matrix.cpu(), made.crop.size)
    torch.testing.assert_close(on_device["image"], on_cpu["image"], atol=1e-3, rtol=1e-3)
    assert (on_device["label"] != on_cpu["label"]).float().mean() < 1e-3  # a place between two voxels may round
    torch.testing.assert_close(on_device["affine"], on_cpu["affine"])


def test_nothing_waits_for_the_device_from_the_crop_to_the_gradient():
    augmentation = [
        *(BatchedContrast(), BatchedBiasField(1.0), BatchedResolution(1.0), BatchedSkullStrip(0.5)),
        BatchedNoise(0.5, sigma=(0.0, 0.05), motion_prob=0.5),
    ]
    made = loader(DEVICE, crops_per_scan=4, augmentation=augmentation, foreground=0.5)
    prepare = PrepareMaskedBatch(InverseFrequencyMask(8, beta=0.5), NoiseSampler(motion_prob=0.5))
    network = MaskedAutoencoder(SSPFormerEncoder(**TINY)).to(DEVICE)
    step = TrainStep(network, MaskedReconstructionLoss(8), compile=False)
    batches = iter(made)
    for n in range(3):
        if n == 1 and DEVICE == "cuda":  # the first batch reads the scans, and makes what is made once
            torch.cuda.set_sync_debug_mode("error")
        try:
            inputs, targets, _, kwargs = prepare(next(batches), torch.device(DEVICE))
            loss = step.backward(inputs, targets, (), kwargs)
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("task", ["pretrain", "segment"])
def test_a_compiled_step_learns_as_an_eager_one(task):
    losses = {}
    for compile in (False, True):
        torch.manual_seed(0)
        if task == "pretrain":
            network, loss = MaskedAutoencoder(SSPFormerEncoder(**TINY)), MaskedReconstructionLoss(8)
        else:
            network = SSPFormerDense(SSPFormerEncoder(**TINY | {"patch_size": 2}), 3, features=8)  # compiles soonest
            loss = BalancedDiceCELoss([1.0] * 3, to_onehot_y=True, softmax=True, include_background=False, batch=True)
        network, loss = network.to(DEVICE), loss.to(DEVICE)
        side = 32 if task == "pretrain" else 8
        image = torch.rand(2, 1, side, side, side, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        if task == "pretrain":
            prepare = PrepareMaskedBatch(InverseFrequencyMask(8))
            batch = prepare({"image": image}, torch.device(DEVICE))
        else:
            batch = image, (image * 3).floor().clamp_max(2), (), {}
        step = TrainStep(network, loss, amp=False, compile=compile)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        losses[compile] = []
        for _ in range(6):
            optimizer.zero_grad(set_to_none=True)
            losses[compile].append(float(step.backward(*batch)))
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        assert step.is_compiled is compile, "it fell back"
    np.testing.assert_allclose(losses[True], losses[False], rtol=2e-2)
    assert losses[True][-1] < losses[True][0]


@pytest.mark.parametrize("task", ["segment", "denoise"])
def test_compiled_windows_in_batches_give_what_single_ones_give_on_the_cpu(task, caplog):
    """Three scans, one ahead of the other. The 12 windows of each are three batches of 5; the last is filled up."""
    torch.manual_seed(0)
    encoder = SSPFormerEncoder(**TINY)
    if task == "segment":
        network = SSPFormerDense(encoder, 3, features=8)
    else:
        network = SSPFormerRestorer(encoder, features=8, noise_scaled=True)
        torch.nn.init.normal_(network.head.weight, std=0.02)
    images = torch.rand(3, 1, 48, 40, 40, generator=torch.Generator().manual_seed(1))
    items = [{"image": f"{i}.nii.gz"} for i in range(3)]
    images = {f"{i}.nii.gz": {"image": image, "name": str(i)} for i, image in enumerate(images)}

    def predict(device, windows, amp, **settings):
        written = []
        evaluator = InferenceEvaluator(
            device=torch.device(device),
            val_data_loader=DataLoader(InferenceDataset(items, lambda item: images[item["image"]]), batch_size=1),
            network=network_to_run(network, "model.pt", device),
            inferer=AutocastSlidingWindowInferer((24, 24, 24), windows, 0.25, mode="gaussian", enabled=amp),
            postprocessing=lambda data: written.append(data["pred"].float().cpu().clone()) or data,
            compile_kwargs={} if DEVICE == "cuda" else {"backend": "aot_eager"},
            **settings,
        )
        evaluator.run()
        assert len(written) == 3, evaluator.state.output
        return torch.stack(written)

    expected = predict("cpu", 1, False, compile=False)
    with caplog.at_level("INFO", "sspformer"):
        for amp, compile, tolerance in ((False, False, 5e-3), (True, True, 5e-2)):  # of the range; TF32 on a GPU
            found = predict(DEVICE, 5, amp, compile=compile)
            assert (found - expected).abs().max() < tolerance * (expected.max() - expected.min()), (amp, compile)
    assert caplog.text.count("the network is compiled") == 1, caplog.text
