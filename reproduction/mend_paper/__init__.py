"""The tables of the MEND paper: models trained here, the edits of each task, and the comparison."""
