"""Records to edit, train and measure with: from files, or from the built-in facts."""

from emendo.data.records import Probe, Record, read_records, write_records

__all__ = ["Probe", "Record", "read_records", "write_records"]
