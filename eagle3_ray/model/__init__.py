"""EAGLE-3 itself: the draft, its attention, its loss, and the few tensors it takes from a verifier.

Knows nothing of Ray, files of samples, or ranks. Shape suffixes used throughout the package:

    T tokens of a bin without its padding   R rows that must be computed in later steps (R <= T)
    N supervised rows (targets)             P TTT steps
    H verifier hidden size                  A auxiliary layers
    V draft vocabulary                      W verifier vocabulary
    Q query heads  G key/value heads        D head dimension
"""
