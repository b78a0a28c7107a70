"""Scripts that make the published figures; see README.md. Run them from the repository root, with ``python -m``."""
