"""Block-sparse attention on NVIDIA GPUs, in Pallas Mosaic GPU: one folder for each chip generation."""
