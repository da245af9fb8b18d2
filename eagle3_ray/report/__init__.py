"""What runs have logged, as one HTML page: read a run folder, make tables, draw, put it together.

    reading.py   run folder -> RunRecord
    tables.py    RunRecords -> headline and tables, as text
    figures.py   which figures there are, and which series each shows
    plots.py     figures, as SVG for the page and PNG beside it; the only user of matplotlib
    page.py      all of it -> HTML without a script and without anything fetched

Reads only what lies in the run folder, needs neither torch nor ray, and may look at a run that is still on.
"""
