"""Pure functions of (parameters, arrays): every Llama, from one definition.

The letters that arrays carry in their names and einsums are written in:

    B batch             D embed        V vocab      E experts
    T query positions   N query heads  L layers     A experts per token
    S key positions     K key heads    F MLP hidden C expert capacity
    G = N / K           H head dim     P patches    J = H / 2, rotated pairs

"axis" is a mesh axis, "dim" a tensor dimension.
"""
