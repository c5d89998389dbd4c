"""The run file: what may be written in it (schema), how it is read (load), and which parts must agree (check)."""
