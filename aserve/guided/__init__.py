"""Guided decoding: outputs that follow a JSON schema, an expression, a list or a grammar.

A guide is compiled before its request is queued (:mod:`aserve.guided.compiler`), in a process that can
be killed. Its matcher lives beside the sampler in the worker, where a drawn token is known first, and
says for every step which tokens may come next.

Three backends do the work. Measured with a vocabulary of 49,152 tokens on one core at about 3 GHz:

====================  ===================  ====================  =======================================
backend               compile, 5 kB schema  mask of a token      what it takes
====================  ===================  ====================  =======================================
llguidance (default)  3 ms                 0.05 ms, p99 0.2 ms   JSON Schema but for a few keywords, which
                                                                 it names; expressions; Lark and GBNF
outlines              8,400 ms, 122 MB     0.02 ms               what has a regular expression: no recursion
                                                                 beyond a few levels, no numeric bounds
lm-format-enforcer    1,300 ms             3 ms a new state      the same
====================  ===================  ====================  =======================================

llguidance is the default for that: it keeps the cost of a large schema out of the way of the first token,
and needs neither a precomputed index of the vocabulary nor a bound on the nesting of JSON.
"""
