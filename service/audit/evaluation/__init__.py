"""p_i(x'): the probability over theta that image i is classified correctly. Each member runs once, the rest is algebra.

The attacker chooses x' knowing the library and the sampling policy, before theta is drawn. x' is chosen on one set of
draws and scored on another, on the uint8 grid. Policies with few enough states are enumerated instead.
"""
