"""The study: does a rule help, whom, and when? Many small paired runs against tuned controls, everything kept as data.

design      what is compared: scenarios (text, model, optimizer) and arms (rules and controls), fixed beforehand
text        corpora to tensors, made once in a folder
bases       the models that runs begin from, made once
trial       one run: scenario, arm, rate, seed -> held-out bits per byte and what was measured beside them
runner      all runs, over processes; a call goes on where the last one has ended
analysis    paired differences with intervals, corrected for the number of arms
tables      the same as Markdown and as plots
"""
