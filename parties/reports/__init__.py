"""What commands print.

tables       costs as tables and JSON
html         a profile as one HTML page with charts
answers      answers, what each took, who learns what
"""
