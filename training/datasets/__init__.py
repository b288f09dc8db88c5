"""Data sets of damaged pictures: their layouts (`layouts`), fast reading of crops (`reading`), and
torch data sets of pairs (`crops`).
"""
