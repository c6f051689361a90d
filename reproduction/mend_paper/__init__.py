"""What emendo is compared on: models made here, and the edits of each task."""
