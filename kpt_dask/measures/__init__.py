"""Measures of label maps: volumes and HU of each label, and how far two label maps agree.

In comes a scan with its labels, and perhaps other labels of the same scan; out go numbers.
"""
