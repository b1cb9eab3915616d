"""The second part of the study: every method with its own rate, and the weight decay tuned too.

`cells` says what is run (the design is docs/evidence-design.md), `search` which run is wanted next,
`run` makes one, `numbers` compares and `report` shows. Of the rest of `experiments` only `report`
imports it. A newcomer adds a task, a method or a control to `cells`.
"""
