"""Corpora: from their original layout to validated data dirs."""
