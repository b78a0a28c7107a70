"""Denoising of held-out heads with Rician noise, against BM4D and non-local means.

    pip install -r benchmarks/requirements.txt
    python benchmarks/denoising.py --data_dir ../shared/data

Other networks at equal time of training are in ``study.py``, which runs this script on them.

Scans: the test split of ``heads`` in the manifest, whose subjects no training has seen. Noise of 1 to 15 %
(``--levels``) is added to the whole scan by :func:`sspformer.transforms.frequency_weighted_noise` with ``alpha=0``,
which is exactly Rician. The level is the standard deviation over the intensity range, 0 to the 99.5th percentile (the
brightest voxel, which the function itself refers to, is up to four times that). Then the region around the middle of
the head (``--region``) is cut out, and every method gets the same region, as BM4D is slow.

Contenders:

- ``input``: the noisy image;
- ``ours``: the bundle's network with its own scaling and sliding window, and its rule for scans with hardly any noise,
  which looks at the whole scan. It is blind: nobody tells it the level. Likewise any others that ``--weights`` names;
- ``BM4D``: the ``bm4d`` package (free for non-commercial use; Maggioni et al., IEEE Trans. Image Process. 22, 2013;
  Makinen et al., same journal 29, 2020) between the forward and the exact unbiased inverse variance-stabilising
  transform of Rician data, :class:`RicianStabilizer`. It is **given the true level**;
- ``NLM``: dipy's non-local means (Coupe et al. 2008) with ``rician=True``, method ``classic``, which in dipy 1.12 is
  well above its default, ``blockwise``. It is **given the true level**;
- ``NLM, blind``: the same, the level estimated on the region by scikit-image's ``estimate_sigma`` (median of wavelet
  coefficients), which is far closer than dipy's own: at 5 % 0.049 to 0.055 for 0.05, dipy's 0.085 to 0.12.

A row a scan, level and method: PSNR and SSIM over the region and over the foreground (brighter than the scan's mean),
seconds, and the bias (mean difference from the clean image) in air and in the foreground. The scans have noise of
their own, which a denoiser would be punished for removing: the clean image is each scan at half its resolution, see
:func:`quiet`.
``denoising_summary.csv`` has means and 95 % intervals over subjects. The script says on which scans a network is below
the input at the lowest level.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from _common import facts, prepare_machine, stopwatch, write_csv
from _restoration import (
    above_mean,
    bundle_config,
    central_region,
    load_clean,
    make_networks,
    manifest_scans,
    picture,
    print_summary,
    quality,
    restoration_parser,
    restore,
    summarize,
)
from torch import Tensor

from sspformer import kspace
from sspformer.transforms import frequency_weighted_noise

TASK = "denoising"
PEERS = {"BM4D": "bm4d", "NLM": "dipy", "NLM, blind": "dipy"}  # the package of each


class RicianStabilizer:
    """Makes the noise of Rician data nearly Gaussian with standard deviation 1, and brings denoised values back.

    Forward, the classical first-order stabiliser: the integral of one over the standard deviation as a function of the
    mean, tabulated. Inverse, the exact unbiased one: a denoised value is the mean of stabilised data, and a table says
    which noise-free signal has that mean (A. Foi, "Noise estimation and removal in MR imaging: the
    variance-stabilization approach", ISBI 2011, who also optimises the forward transform further). For signals from 0
    to 2000 in units of the noise's standard deviation. The stabilised standard deviation is 0.89 in air, 1.06 at most
    and 1.00 from a signal of 5 on.
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


def make_methods(args, networks) -> dict[str, Callable[[Tensor, float], Tensor]]:
    """What makes a denoised image ``(1, *S)`` of a noisy one and the true standard deviation of its noise, by name."""
    inferer = bundle_config("inference", TASK, args.device).get_parsed_content("inferer")

    def on_arrays(function: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[Tensor, float], Tensor]:
        return lambda noisy, sigma: torch.from_numpy(np.asarray(function(noisy[0].numpy(), sigma), np.float32))[None]

    threads = torch.get_num_threads()
    peers = {
        "BM4D": on_arrays(partial(with_bm4d, stabilizer=RicianStabilizer())),
        "NLM": on_arrays(partial(with_nlm, blind=False, threads=threads)),
        "NLM, blind": on_arrays(partial(with_nlm, blind=True, threads=threads)),
    }
    return {
        "input": lambda noisy, sigma: noisy,
        **{
            name: lambda noisy, sigma, network=network: restore(noisy, network, inferer, args.device)
            for name, network in networks.items()
        },
        **{name: method for name, method in peers.items() if name in args.peers},
    }


def bias(pred: Tensor, clean: Tensor, foreground: Tensor) -> dict[str, float | str]:
    """Mean difference from the clean image in air (below 1 %) and in the foreground."""
    return {
        f"bias_{name}": round(float((pred - clean)[where].mean()), 5) if where.any() else ""
        for name, where in (("air", clean < 0.01), ("foreground", foreground))
    }


def plot(path: Path, summary: Sequence[Mapping]) -> None:
    """Gain in PSNR over the input by level, with the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    names = [name for name in dict.fromkeys(line["method"] for line in summary) if name != "input"]
    for panel, metric in zip(panels, ("gain_psnr", "gain_psnr_foreground"), strict=True):
        for i, name in enumerate(names):
            lines = [line for line in summary if line["method"] == name]
            mean, low, high = (
                np.array([line[f"{metric}_{part}"] for line in lines]) for part in ("mean", "ci_low", "ci_high")
            )
            level = np.array([line["level"] for line in lines]) * 100 + 0.08 * (i - len(names) / 2)
            panel.errorbar(level, mean, [mean - low, high - mean], marker="o", markersize=3, capsize=2, label=name)
        panel.axhline(0, color="grey", linestyle=":")
        panel.set(xlabel="Rician noise, % of the intensity range", title="foreground" if "fore" in metric else "region")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR over the noisy input, dB")
    panels[0].legend(title="BM4D and NLM know the level")
    figure.savefig(path, dpi=130)
    print(f"written to {path}")


def quiet(image: Tensor) -> tuple[Tensor, Tensor]:
    """A scan ``(1, *S)`` at half its resolution along every axis of 96 voxels or more, in [0, 1] to its 99.5th
    percentile, and its foreground.

    The scans have noise of their own, 1 to 5 % of the range: more than the weakest that is added, and what removed it
    would count as wrong. Half of each axis of k-space leaves a third of it (1 / sqrt(8)); the anatomy left is real.
    """
    size = [side // 2 if side >= 96 else side for side in image.shape[1:]]
    image = kspace.fourier_resample(image[None], size)[0].clamp(min=0)
    image = image / np.percentile(image.numpy(), 99.5)
    return image, above_mean(image)


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
    missing = sorted({PEERS[name] for name in args.peers if importlib.util.find_spec(PEERS[name]) is None})
    if missing:
        parser.error(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}, or choose --peers")
    prepare_machine(parser, args)

    blend_by_noise = bundle_config("inference", TASK, args.device).get_parsed_content("blend_by_noise")
    scans = manifest_scans(args.data_dir, "test")[: args.max_scans]
    networks = make_networks(TASK, args)
    methods = make_methods(args, networks)
    setting = {"seed": args.seed, "noise": "Rician", **facts(args.device)}
    setting |= {package: version(package) for package in sorted({PEERS[name] for name in args.peers})}
    rows, pictured = [], []
    for i, scan in enumerate(scans):
        clean, foreground = quiet(load_clean(scan["image"])[0])
        region = central_region(foreground, args.region)
        for level in args.levels:
            # the same field, scaled, at every level of a scan
            generator = torch.Generator().manual_seed(1000 * args.seed + i)
            noisy = frequency_weighted_noise(clean[None], level, 0.0, generator=generator, intensity_range=1.0)
            share = blend_by_noise[0].share(noisy[0]) if blend_by_noise else 1.0
            noisy = noisy[0][region]
            images = {}
            for name, method in methods.items():
                seconds = stopwatch(lambda: images.update({name: method(noisy, level)}), args.device)  # noqa: B023
                if name in networks:  # as the bundle does, judged on the whole scan
                    images[name] = torch.lerp(noisy, images[name], share)
                of = images[name], clean[region], foreground[region]
                row = {"scan": Path(scan["file"]).name.removesuffix(".nii.gz"), "subject": scan["subject"]}
                row |= {"contrast": scan["contrast"], "level": level, "method": name, **quality(*of), **bias(*of)}
                row |= {"seconds": round(seconds, 2), "region": "x".join(str(side) for side in noisy.shape[1:])}
                rows.append(row | setting)
                print("{scan}  {level:.0%}  {method:10s} {psnr:.2f} dB  SSIM {ssim:.4f}  {seconds:.1f} s".format(**row))
            if level == args.levels[len(args.levels) // 2] and row["scan"] in args.pictured:
                pictured.append((f"{row['scan']}\n{level:.0%} noise", clean[region], images))
        write_csv(args.output, rows)

    summary = summarize(rows, ("level", "method"), "input", args.seed)
    print_summary(summary, ("level", "method"))
    write_csv(args.output.with_name(f"{args.output.stem}_summary.csv"), summary)
    plot(args.output.with_suffix(".png"), summary)
    if pictured:
        picture(args.output.with_name(f"{args.output.stem}_images.png"), pictured)
    for name in networks:
        compare_at_lowest(rows, name, min(args.levels))


def compare_at_lowest(rows: Sequence[Mapping], name: str, level: float) -> None:
    """Says on which scans a network is below the input."""
    psnr = {(row["scan"], row["method"]): row["psnr"] for row in rows if row["level"] == level}
    gains = {scan: psnr[scan, name] - psnr[scan, "input"] for scan, method in psnr if method == "input"}
    worst = min(gains, key=gains.get)
    below = [f"{scan} ({gain:+.2f} dB)" for scan, gain in gains.items() if gain < 0]
    print(f"\nat {level:.0%} {name} is below the input on {len(below)} of {len(gains)} scans", *below, sep="\n  ")
    print(f"its smallest gain is {gains[worst]:+.2f} dB, on {worst}")


if __name__ == "__main__":
    main()
