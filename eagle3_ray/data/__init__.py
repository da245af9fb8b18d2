"""From bytes on disk to tensors on a rank.

`samples` reads one file, `index` reads all of them once, `packing` plans which samples share a bin, `batch`
makes a bin's tensors, `source` finds and reads a bin's samples, `pipeline` streams the bins to the ranks, `vocab`
chooses the draft's vocabulary; `flat` holds what there is a million of. `bad_files` and `quarantine` are about
files that are no usable samples, `planned` about planning alike when a run goes on.
"""
