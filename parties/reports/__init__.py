"""Tables, answers and reports that the commands print.

tables       tables of figures
capacity     a capacity plan
html         a profile as one HTML page with charts
who_learns   who learns what in a deployment, for terminal and documents
verified     receipts, compared with Programs
answers      answers and what each took
"""
