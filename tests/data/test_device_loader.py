"""Batches drawn where the network is: complete epochs, the same draws again, and the same wherever the scans lie."""

import weakref

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor

from sspformer.data import DeviceLoader, ScanBuffer
from sspformer.data.device_loader import labelled_voxels
from sspformer.transforms import BatchedContrast, BatchedNoise, CropSampler

SHAPES = [(12, 14, 10), (16, 9, 11), (10, 10, 10), (13, 12, 15), (11, 18, 9)]


def dataset(n=5):
    """Scan number i has intensities from i to i + 0.5."""
    items = []
    for i in range(n):
        image = (i + 0.5 * torch.rand(1, *SHAPES[i], generator=torch.Generator().manual_seed(i))).half()
        affine = torch.diag(torch.tensor([1.0 + 0.1 * i, 1.0, 2.0, 1.0], dtype=torch.float64))
        items.append(
            {"image": MetaTensor(image, affine=affine), "label": MetaTensor((image > i).byte(), affine=affine)}
        )
    return Dataset(items)


def loader(**options):
    settings = {"crop": CropSampler((8, 8, 8)), "batch_size": 2, "crops_per_scan": 3, "keys": ("image", "label")}
    return DeviceLoader(dataset(), **settings | options)


def scan_of(batch):
    return batch["image"].flatten(1).median(dim=1).values.floor().int().tolist()


def test_an_epoch_has_so_many_crops_of_each_scan_in_batches_of_one_size():
    batches = list(made := loader())
    assert len(batches) == len(made) == 8  # 15 crops, and one that fills the last batch up
    assert all(batch["image"].shape == (2, 1, 8, 8, 8) for batch in batches)
    assert batches[0]["label"].dtype == torch.uint8 and batches[0]["image"].dtype == torch.float32
    scans = [scan for batch in batches for scan in scan_of(batch)]
    assert sorted(scans[:15]) == sorted([0, 1, 2, 3, 4] * 3)
    spacing = torch.cat([batch["spacing"] for batch in batches])
    assert torch.allclose(spacing, torch.tensor([[1 + 0.1 * scan, 1, 2] for scan in scans]))


@pytest.mark.parametrize("residence", ["device", "host", "disk"])
def test_draws_depend_on_the_seed_alone_wherever_the_scans_lie(residence):
    augmentation = [BatchedContrast(0.5), BatchedNoise(0.5, sigma=0.1)]
    made = loader(residence=residence, augmentation=augmentation, labelled=0.5)
    same = [BatchedContrast(0.5), BatchedNoise(0.5, sigma=0.1)]
    reference = loader(residence="device", augmentation=same, labelled=0.5)
    for seed in (1, 2, 1):
        made.set_random_state(seed)
        reference.set_random_state(seed)
        for found, wanted in zip(made, reference, strict=True):
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    one = next(iter(reference.set_random_state(1)))["image"]
    assert not torch.equal(one, next(iter(reference.set_random_state(2)))["image"])


def test_slices_of_volumes():
    made = loader(crop=CropSampler((8, 8), rotate=0.3, scale=(0.8, 1.2)))
    batch = next(iter(made))
    assert batch["image"].shape == batch["label"].shape == (2, 1, 8, 8) and batch["spacing"].shape == (2, 2)


def test_scans_that_do_not_fit_stay_on_the_disk(monkeypatch):
    monkeypatch.setattr("sspformer.data.device_loader._free", lambda device: 1000)
    monkeypatch.setattr("sspformer.data.device_loader.PROBED", 2)
    made = loader()
    assert len(list(made)) == 8 and made.residence == "disk"


def test_all_processes_have_their_scans_where_the_one_with_the_least_room_has(monkeypatch):
    monkeypatch.setattr("ignite.distributed.all_reduce", lambda place, op: max(place, 2))
    made = loader()
    batch = next(iter(made))
    assert made.residence == "disk" and made._buffer is None and batch["image"].shape[0] == 2


@pytest.mark.parametrize("residence", ["auto", "host"])
def test_while_scans_are_read_about_one_copy_of_them_is_held(residence, monkeypatch):
    alive, most = weakref.WeakSet(), 0

    class Scans(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            nonlocal most
            image = torch.full((1, 8, 8, 8 + i % 3), float(i)).half()
            alive.add(image)
            most = max(most, len(alive))
            return {"image": MetaTensor(image), "target": i}

    made = DeviceLoader(Scans(), CropSampler((8, 8, 8)), 4, residence=residence)
    made.prepare()
    buffer = made._buffer
    assert most <= 3, "a scan, its MetaTensor, the scan before"
    held = sum(flat.untyped_storage().nbytes() for flat in buffer._flat.values())
    assert buffer.nbytes <= held < 1.2 * buffer.nbytes
    assert buffer.numbers["target"].tolist() == list(range(40))
    assert all((buffer.voxels["image"][o : o + 512] == i).all() for i, o in enumerate(buffer.offset))


class OnGPU(ScanBuffer):
    """Says that it lies on a GPU."""

    def to(self, device):
        self.where = torch.device(device).type
        return self


@pytest.mark.parametrize(
    ("free", "drawn_on", "residence"),
    [
        (3.0, None, "device"),
        (1.5, None, "host"),
        (1.5, "cuda", "device"),  # tighter, but it was there
        (1.1, "cuda", "host"),
        (3.0, "cpu", "host"),  # there is room on the GPU by now, but it was not there
    ],
)
def test_a_run_that_goes_on_has_its_scans_where_they_were(free, drawn_on, residence, monkeypatch):
    scans = dataset()
    needed = sum(item[key].nbytes for item in scans for key in ("image", "label"))
    monkeypatch.setattr(
        "sspformer.data.device_loader._free", lambda device: needed * (free if device.type == "cuda" else 10)
    )
    monkeypatch.setattr("sspformer.data.device_loader.ScanBuffer", OnGPU)
    made = loader(device="cuda")
    made.load_state_dict({"drawn_on": drawn_on})
    made.prepare()
    assert made.residence == residence
    assert made._buffer.where == ("cuda" if residence == "device" else "cpu")


def test_crops_that_are_drawn_elsewhere_than_before_are_named(caplog):
    first = loader()
    next(iter(first))
    assert first.state_dict() == {"drawn_on": "cpu"}
    for drawn_on, warned in (("cpu", False), ("cuda", True)):
        caplog.clear()
        made = loader(residence="device")
        made.load_state_dict({"drawn_on": drawn_on})
        list(made), list(made)
        assert caplog.text.count("were drawn on cuda, and now they are on cpu") == warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residence": "gpu"}, "residence must be auto, device, host, disk"),
        ({"batch_size": 0}, "batch_size and crops_per_scan must be 1 or more"),
        ({"labelled": 1.5}, "labelled must be between 0 and 1, got 1.5"),
        ({"labelled": 0.3, "keys": ["image"]}, "labelled 0.3 needs labels, and label is not among the keys"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)
    with pytest.raises(ValueError, match="no scan"):
        DeviceLoader(Dataset([]), CropSampler((8, 8, 8)), 1)


def test_crops_with_little_foreground_are_drawn_again():
    image = torch.zeros(1, 40, 40, 40)
    image[:, :14, :14, :14] = 1
    scans = Dataset([{"image": MetaTensor(image)}])
    shares = []
    for foreground in (0.0, 0.5):
        made = DeviceLoader(scans, CropSampler((8, 8, 8)), 200, crops_per_scan=200, foreground=foreground)
        shares.append((next(iter(made))["image"] > 0.5).float().mean().item())
    assert shares[1] > 3 * shares[0]


@pytest.mark.parametrize("settings", [{}, {"scale": (0.8, 1.2), "rotate": 0.3, "flip_prob": 0.5}])
def test_a_share_of_the_crops_has_labels_of_each_class_as_often_as_of_another(settings):
    label = torch.zeros(1, 60, 60, 60, dtype=torch.uint8)
    label[0, 50:55, 3:9, 30:40], label[0, 20, 20, 20] = 1, 2
    image = torch.zeros(1, 60, 60, 60)
    image[:, :, 30:] = 1  # nowhere near the labels
    items = [{"image": MetaTensor(image), "label": MetaTensor(label)}]
    items += [
        {
            "image": MetaTensor(torch.zeros(1, 30, 30, 30)),
            "label": MetaTensor(label[:, :1, :1, :1].expand(1, 30, 30, 30)),
        }
    ]
    found = []
    for labelled, foreground in ((0.0, 0.0), (0.5, 0.0), (0.5, 0.5)):
        options = {"crops_per_scan": 200, "keys": ("image", "label"), "labelled": labelled, "foreground": foreground}
        made = DeviceLoader(Dataset(items), CropSampler((10, 10, 10), **settings), 400, **options)
        crops = next(iter(made))["label"].flatten(1)
        found.append([((crops == value).any(dim=1)).float().mean().item() * 2 for value in (1, 2)])
    assert max(found[0]) < 0.1  # of the scan that has labels; the other is cropped anywhere
    assert found[1] == pytest.approx([0.25, 0.25], abs=0.07) and found[2] == pytest.approx([0.25, 0.25], abs=0.07)


def test_labelled_voxels_are_spread_over_each_class():
    label = torch.zeros(4, 5, 300, dtype=torch.uint8)
    label[1, 2], label[3, 4, 7] = 4, 9
    found = labelled_voxels(label, 100)
    assert found.shape == (100, 3) and found[1::2].tolist() == [[3, 4, 7]] * 50
    assert found[::2, 2].unique().numel() > 40 and found[::2, 2].min() < 30 and found[::2, 2].max() > 270
    assert torch.equal(labelled_voxels(label, 100), found)
    cube = labelled_voxels(torch.ones(64, 64, 64, dtype=torch.uint8), 1024)
    assert all(axis.unique().numel() == 64 for axis in cube.T)
    assert labelled_voxels(torch.zeros(3, 3, 3, dtype=torch.int16), 7).tolist() == [[-1, -1, -1]] * 7
    with pytest.raises(ValueError, match="maps of integers, got torch.float32"):
        labelled_voxels(torch.zeros(3, 3, 3), 7)


def test_beyond_its_ends_a_scan_is_mirrored():
    image = torch.rand(1, 6, 5, 4)
    scans = Dataset([{"image": MetaTensor(image)}])
    batch = next(iter(DeviceLoader(scans, CropSampler((14, 9, 12), mirror=True), 1)))
    mirrored = torch.from_numpy(np.pad(image[0].numpy(), 8, mode="symmetric"))
    where = tuple(slice(8 + int(first), 8 + int(first) + n) for first, n in zip(batch["affine"][0, :3, 3], (14, 9, 12)))
    assert torch.equal(batch["image"][0, 0], mirrored[where])


@pytest.mark.parametrize("mirror", [False, True])
def test_crops_on_the_grid_are_the_same_without_interpolation(mirror):
    made = loader(crop=CropSampler((14, 8, 12), flip_prob=0.5, margin=0.3, mirror=mirror))
    made.prepare()
    index = torch.arange(5)
    matrix = made.crop(made._buffer.shape, made._buffer.spacing, torch.Generator().manual_seed(0))
    taken, interpolated = (
        made._buffer.crops(index, matrix, made.crop.size, mirror, on_grid) for on_grid in (True, False)
    )
    assert made.crop.on_grid and not CropSampler((8, 8, 8), scale=(0.9, 1.1)).on_grid
    for name in ("image", "label", "affine"):
        assert torch.equal(taken[name], interpolated[name]) and taken[name].dtype == interpolated[name].dtype
