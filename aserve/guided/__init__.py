"""Guided decoding: outputs that follow a JSON schema, an expression, a list or a grammar.

A guide is compiled before its request is queued (:mod:`aserve.guided.compiler`), in a process that can
be killed. Its matcher lives beside the sampler in the worker, where a drawn token is known first, and
says for every step which tokens may come next.

Three backends do the work. Measured with a vocabulary of 49,152 tokens on one core of a busy machine:

====================  =======================  ======================  ================================
backend               compile a 5 kB schema    mask of one token       schemas of 30 that it does
====================  =======================  ======================  ================================
llguidance (default)  3 ms                     0.03 ms, p99 0.5 ms     30
outlines              8,400 ms, 119 MB         0.2 ms, p99 2 ms        27, and not the 5 kB one
lm-format-enforcer    7,500 ms, 1 MB           1.9 ms, p99 11 ms       26
====================  =======================  ======================  ================================

Every finished output of all of them is valid under its schema (tests/guided). llguidance is the default
because it alone keeps a large schema out of the way of the first token, needs neither an index of the
vocabulary nor a bound on the nesting of JSON, and has grammars.
"""
