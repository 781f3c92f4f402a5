"""Batched CTC decoding and scoring."""
