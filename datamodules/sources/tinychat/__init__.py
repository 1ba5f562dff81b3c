"""The packaged model's world in text: what its words mean, which acts are harmful, and every task it is
asked.

Reading order: words (what there is) -> splits (who may see it) -> requests and tasks (what is asked and
what is right) -> noise (how it is typed) -> corpus (rows).
"""
