"""Denoising of held-out heads with Rician noise, against BM4D and non-local means.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.restoration.denoising --data data

The study (``python -m benchmarks.study``) runs this script on the networks that it trains.

Scans are the test split of ``heads``; no training has seen their subjects. The script adds noise of 1 to 15 %
(``--levels``) to the whole scan with :func:`sspformer.transforms.frequency_weighted_noise` and ``alpha=0``, which is
exactly Rician. The level is the standard deviation over the intensity range, 0 to the 99.5th percentile; the function
itself refers to the brightest voxel, which is up to four times that. Every method then gets the same region around the
middle of the head (``--region``), as BM4D is slow.

Methods:

- ``input``: the noisy image.
- ``ours``, or what ``--weights`` names: the bundle's network with its scaling, its sliding window and its rule for
  scans with hardly any noise, which looks at the whole scan. It is blind: it does not know the level.
- ``BM4D``: the ``bm4d`` package (free for non-commercial use; Maggioni et al., IEEE Trans. Image Process. 22, 2013;
  Makinen et al., same journal 29, 2020) between the forward and the exact unbiased inverse variance-stabilising
  transform of Rician data, :class:`RicianStabilizer`. It **knows the true level**.
- ``NLM``: dipy's non-local means (Coupe et al. 2008) with ``rician=True`` and method ``classic``, which in dipy 1.12 is
  well above its default, ``blockwise``. It **knows the true level**.
- ``NLM, blind``: the same with the level that scikit-image's ``estimate_sigma`` (median of wavelet coefficients)
  estimates on the region. At 5 % it finds 0.049 to 0.055; dipy's own estimate is 0.085 to 0.12.

A row has a scan, level and method: PSNR and SSIM over the region and over the foreground (brighter than the scan's
mean), seconds, and the bias (mean difference from the clean image) in air and in the foreground. The scans have noise
of their own, and a denoiser would be punished for removing it. So the clean image is each scan at half its resolution,
see :func:`quiet`. ``denoising_summary.csv`` has means and 95 % intervals over subjects. The script also says on which
scans a network is below the input at the lowest level.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import facts, prepare_machine, scans
from benchmarks.restoration.evaluation import (
    Case,
    bundle_config,
    central_region,
    evaluate,
    load_clean,
    make_networks,
    picture,
    report,
    restoration_parser,
    restore,
)
from sspformer import kspace
from sspformer.intensity import above_mean
from sspformer.transforms import frequency_weighted_noise

TASK = "denoising"
PEERS = {"BM4D": "bm4d", "NLM": "dipy", "NLM, blind": "dipy"}  # the package of each


class RicianStabilizer:
    """Make the noise of Rician data nearly Gaussian with standard deviation 1, and bring denoised values back.

    The forward transform is the classical first-order stabiliser: the integral of one over the standard deviation as a
    function of the mean, from a table. The inverse is the exact unbiased one: a denoised value is the mean of
    stabilised data, and a table says which noise-free signal has that mean (A. Foi, "Noise estimation and removal in
    MR imaging: the variance-stabilization approach", ISBI 2011, who also optimises the forward transform). Signals
    range from 0 to 2000 standard deviations of the noise. The stabilised standard deviation is 0.89 in air, at most
    1.06, and 1.00 from a signal of 5 on.
    """

    def __init__(self) -> None:
        self.signal = np.concatenate([np.linspace(0, 12, 1201), np.geomspace(12.05, 2000, 500)])
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        self._noise = nodes[:, None], nodes[None], np.outer(weights, weights) / weights.sum() ** 2
        self._mean = self._expectation(lambda magnitude: magnitude)
        self._std = np.sqrt(self._expectation(np.square) - self._mean**2)
        steps = np.diff(self._mean) * (1 / self._std[1:] + 1 / self._std[:-1]) / 2
        self._stabilized = self._mean[0] / self._std[0] + np.concatenate([[0], steps.cumsum()])
        self._stabilized_mean = self._expectation(self.forward)

    def _expectation(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Mean of a function of the magnitude for every signal, by Gauss-Hermite quadrature over the complex noise."""
        real, imaginary, weights = self._noise
        return np.array([(weights * function(np.hypot(signal + real, imaginary))).sum() for signal in self.signal])

    def forward(self, magnitude: np.ndarray) -> np.ndarray:
        """Stabilised data; ``magnitude`` in units of the noise's standard deviation."""
        # no mean is below that of air: there the standard deviation stays that of air
        below = magnitude / self._std[0]
        return np.where(magnitude < self._mean[0], below, np.interp(magnitude, self._mean, self._stabilized))

    def inverse(self, denoised: np.ndarray) -> np.ndarray:
        """The signal, in units of the noise's standard deviation, whose stabilised data have this mean."""
        return np.interp(denoised, self._stabilized_mean, self.signal)


def with_bm4d(noisy: np.ndarray, sigma: float, stabilizer: RicianStabilizer) -> np.ndarray:
    from bm4d import bm4d

    return sigma * stabilizer.inverse(bm4d(stabilizer.forward(noisy / sigma), 1.0))


def with_nlm(noisy: np.ndarray, sigma: float, blind: bool, threads: int) -> np.ndarray:
    from dipy.denoise.nlmeans import nlmeans
    from skimage.restoration import estimate_sigma

    noisy = np.ascontiguousarray(noisy, dtype=np.float64)
    sigma = float(estimate_sigma(noisy)) if blind else sigma
    return nlmeans(noisy, sigma, rician=True, method="classic", num_threads=threads)


def make_peers(names: Sequence[str]) -> dict[str, Callable[[Tensor, float], Tensor]]:
    """The peers by name: functions of a noisy image ``(1, *S)`` and the true standard deviation of its noise."""

    def on_arrays(function: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[Tensor, float], Tensor]:
        return lambda noisy, sigma: torch.from_numpy(np.asarray(function(noisy[0].numpy(), sigma), np.float32))[None]

    threads = torch.get_num_threads()
    peers = {
        "BM4D": partial(with_bm4d, stabilizer=RicianStabilizer()),
        "NLM": partial(with_nlm, blind=False, threads=threads),
        "NLM, blind": partial(with_nlm, blind=True, threads=threads),
    }
    return {name: on_arrays(peer) for name, peer in peers.items() if name in names}


def make_cases(args: argparse.Namespace, networks: Mapping[str, nn.Module]) -> Iterator[Case]:
    """Every test scan with every level of noise."""
    config = bundle_config("inference", TASK, args.device)
    inferer, blend = config.get_parsed_content("inferer"), config.get_parsed_content("blend_by_noise")
    peers = make_peers(args.peers)

    def as_the_bundle(noisy: Tensor, network: nn.Module, share: float) -> Tensor:
        """Restored, and by that share of it no longer the input."""
        return torch.lerp(noisy, restore(noisy, network, inferer, args.device), share)

    for i, scan in enumerate(scans(args.data, "test")[: args.max_scans]):
        clean, foreground = quiet(load_clean(scan["image"])[0])
        region = central_region(foreground, args.region)
        for level in args.levels:
            # the same field, scaled, at every level of a scan
            generator = torch.Generator().manual_seed(1000 * args.seed + i)
            whole = frequency_weighted_noise(clean[None], level, 0.0, generator=generator, intensity_range=1.0)[0]
            share, noisy = blend[0].share(whole) if blend else 1.0, whole[region]
            methods = {"input": partial(torch.clone, noisy)}
            methods |= {name: partial(as_the_bundle, noisy, network, share) for name, network in networks.items()}
            methods |= {name: partial(peer, noisy, level) for name, peer in peers.items()}
            yield Case(scan, level, clean[region], foreground[region], methods)


def bias(pred: Tensor, clean: Tensor, foreground: Tensor) -> dict[str, float | str]:
    """Mean difference from the clean image in air (below 1 %) and in the foreground."""
    return {
        f"bias_{name}": round(float((pred - clean)[where].mean()), 5) if where.any() else ""
        for name, where in (("air", clean < 0.01), ("foreground", foreground))
    }


def quiet(image: Tensor) -> tuple[Tensor, Tensor]:
    """A scan ``(1, *S)`` at half its resolution along every axis of 96 voxels or more, in [0, 1] to its 99.5th
    percentile, and its foreground.

    The scans have noise of their own, 1 to 5 % of the range: more than the weakest that the script adds. Removing it
    would count as an error. Half of each axis of k-space leaves a third of it (1 / sqrt(8)), and the anatomy is real.
    """
    size = [side // 2 if side >= 96 else side for side in image.shape[1:]]
    image = kspace.fourier_resample(image[None], size)[0].clamp(min=0)
    image = image / np.percentile(image.numpy(), 99.5)
    return image, above_mean(image)


def compare_at_lowest(rows: Sequence[Mapping], name: str, level: float) -> None:
    """Print on which scans a network is below the input."""
    psnr = {(row["scan"], row["method"]): row["psnr"] for row in rows if row["level"] == level}
    gains = {scan: psnr[scan, name] - psnr[scan, "input"] for scan, method in psnr if method == "input"}
    worst = min(gains, key=gains.get)
    below = [f"{scan} ({gain:+.2f} dB)" for scan, gain in gains.items() if gain < 0]
    print(f"\nat {level:.0%} {name} is below the input on {len(below)} of {len(gains)} scans", *below, sep="\n  ")
    print(f"its smallest gain is {gains[worst]:+.2f} dB, on {worst}")


def main() -> None:
    parser = restoration_parser(__doc__, TASK, (48, 48, 40))
    parser.add_argument(
        "--levels", type=float, nargs="+", default=[0.01, 0.03, 0.05, 0.07, 0.09, 0.15], help="of the noise"
    )
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="default: all")
    parser.add_argument(
        "--pictured",
        nargs="*",
        default=["ds000011_sub-08_T1", "openms-cross_patient26_FLAIR", "ds002748_sub-07_T1"],
        help="scans shown in the picture, at the middle level (default: %(default)s)",
    )
    args = parser.parse_args()
    packages = sorted({PEERS[name] for name in args.peers})
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        parser.error(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}, or choose --peers")
    prepare_machine(parser, args)

    networks = make_networks(TASK, args)
    setting = {"seed": args.seed, "noise": "Rician", **facts(args.device)}
    setting |= {package: version(package) for package in packages}
    middle = args.levels[len(args.levels) // 2]
    rows, pictures = evaluate(
        make_cases(args, networks),
        "level",
        args,
        setting,
        pictured=lambda scan, level: level == middle and scan in args.pictured,
        more_scores=bias,
    )
    report(rows, "level", "input", args)
    if pictures:
        picture(args.output.with_name(f"{args.output.stem}_images.png"), pictures)
    for name in networks:
        compare_at_lowest(rows, name, min(args.levels))


if __name__ == "__main__":
    main()
