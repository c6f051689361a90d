"""Records to edit, train and evaluate with, read from files or made from the built-in facts."""

from emendo.data.records import read_records, stream_records, write_records
from emendo.data.schema import Consequence, Probe, Record, RecordSet

__all__ = [
    "Consequence",
    "Probe",
    "Record",
    "RecordSet",
    "read_records",
    "stream_records",
    "write_records",
]
