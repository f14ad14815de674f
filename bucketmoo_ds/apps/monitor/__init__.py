"""What a run did: conflict statistics from Grams that exist anyway, JSON lines, plots and reports.

`statistics` and `writer` run inside training and need torch and the standard library only; `plots` and `report` run
afterwards and need the `train` extra (matplotlib, jinja2).
"""
