"""Edits as values: low-rank changes of a few matrices that are applied, saved, merged, fused and exported."""
