"""Whole heads with three quarters of their patches hidden, and what a pretrained network reconstructs.

    python -m benchmarks.figures.reconstruction_figure --run output/pretrain_heads --images A.nii.gz B.nii.gz

``--run`` is the ``output_dir`` of a 3D pretraining with the tiny preset and patches of 8. It saw crops; whole heads
pass through the same weights, as positions are relative. Masks are uniform, thermal noise is 2 to 6 percent.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.image import imsave

from benchmarks.common import IMAGES, argument_parser, head_loader
from sspformer.engines import PrepareMaskedBatch, Reconstruct
from sspformer.networks import MaskedAutoencoder, SSPFormerEncoder
from sspformer.pictures import figure_to_array, reconstruction_panel
from sspformer.transforms import InverseFrequencyMask, NoiseSampler


def main() -> None:
    parser = argument_parser(__doc__, IMAGES / "reconstruction.png")
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a pretraining run")
    parser.add_argument("--images", nargs="+", required=True, help="NIfTI files that the run was not trained on")
    parser.add_argument("--spacing", type=float, default=2.0, help="mm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    network = MaskedAutoencoder(SSPFormerEncoder()).eval()
    network.load_state_dict(torch.load(args.run / "models/checkpoint.pt", weights_only=True)["network"])
    prepare = PrepareMaskedBatch(InverseFrequencyMask(8, beta=0.0), NoiseSampler(sigma=(0.02, 0.06)), seed=args.seed)
    reconstruct = Reconstruct(network)

    rows = []
    for batch in head_loader(args.images, args.spacing):
        noisy, target, _, indices = prepare(batch, "cpu")
        with torch.no_grad():
            output = reconstruct({"label": target, "pred": network(noisy, **indices)})
        error = (output["pred_masked"] - output["true_masked"]).square().mean()
        baseline = (output["mean_masked"] - output["true_masked"]).square().mean()
        print(f"error of the hidden patches {error:.4f}, of predicting the mean {baseline:.4f}")
        rows.append(torch.from_numpy(figure_to_array(reconstruction_panel(output), dpi=110)))
    width = min(row.shape[1] for row in rows)
    imsave(args.output, torch.cat([row[:, :width] for row in rows]).numpy())


if __name__ == "__main__":
    main()
