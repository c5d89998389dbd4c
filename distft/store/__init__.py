"""How artifacts live: immutable files under unique names, and a manifest, written last, that says which of them count."""
