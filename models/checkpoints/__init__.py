"""Checkpoints: reading and writing weights, tokenizers and settings in the Hugging Face and GGUF formats."""
