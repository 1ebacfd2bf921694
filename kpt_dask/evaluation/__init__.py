"""Evaluation against known labels: what the results section of a paper says, as numbers and a page.

In: a store, and scans whose labels are known. Out: agreement of each organ with its reference, with
intervals (`run`), a folder of tables and a page (`folder`). Equations are those of the measures.
Must not be imported by what it judges.
"""
