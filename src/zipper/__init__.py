"""Zipper: pre-trained decoders of single modalities, fused by gated cross-attention."""
