"""A real pretrained language model as the judge of what policies keep: right answers under every policy and budget.

One prefill of a prompt serves all conditions: the product's own policies choose from its queries, keys and values, and
the answer's tokens are run over the kept cells, all conditions in one batch.  No server takes part.
"""
