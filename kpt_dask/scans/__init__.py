"""Files and scans: DICOM, NIfTI, NRRD, MetaImage and OME-Zarr in, label maps out on their grid.

In: paths. Out: a `Scan` (planes read on demand, and a grid), or a file of labels.
Every damage or doubt of a file is reported in a sentence that names it.
Must not import volumes or atlases.
"""
