"""Quality of denoising and super-resolution on held-out heads."""
