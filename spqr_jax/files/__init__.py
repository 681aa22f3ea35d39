"""The door: everything that comes from outside is read here, checked, and named in one message where it is wrong."""

from spqr_jax.files.entries import Entries
from spqr_jax.files.fields import read_fields
from spqr_jax.files.json_file import read_json, read_object
from spqr_jax.files.text import checked_characters, decode_text

__all__ = ["Entries", "checked_characters", "decode_text", "read_fields", "read_json", "read_object"]
