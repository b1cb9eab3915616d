"""The study of docs/study.md: what it runs, the files it keeps, what it makes of them.

`cells` says what is run and `run` runs it; `files` keeps a row a run and chooses rates; `numbers`
compares, `table` and `pictures` show, `write` makes docs/results.md. Of the rest of `experiments`
only `report` imports it. A newcomer adds a method, a control or a task to `cells`.
"""
