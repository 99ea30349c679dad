"""Cells of KV memory: which token each holds, and the indexes by which attention reads them."""
