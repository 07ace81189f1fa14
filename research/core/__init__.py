"""Floor 0: what every other floor may use.

The dimension legend, the same letter everywhere (annotations, einsums, docstrings):

    B batch            T query positions     S key positions
    D model width      F MLP width           H head width
    N query heads      K key/value heads     G query heads per key/value head
    V vocabulary       E experts             L layers
    M encoder positions                      R rank

A dimension without a letter has a word: `"rows D"`, `"B pages_per_row"`.
"""
