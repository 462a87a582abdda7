"""Whole sessions in a folder: what is written, how it stays whole, and what is refused.

`saving.py` and `loading.py` are the two ways through; `Session.save` and `Engine.load_session` call
them. `manifest.py` says what a saved session is, `manifest_file.py` seals it, `shards.py` and
`shard_form.py` hold keys and values, `stretches.py` decides which of them are written anew,
`directory.py` touches the file system, `fingerprints.py` and `mismatches.py` say whether a session
fits a model, `lineage.py` what a session knows of where it was saved.
"""
