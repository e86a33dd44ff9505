"""Graph in, decisions and a rewritten graph out: sites → rules → placement → rewrite → materialize.

Detection touches no weight; a rewrite changes only what a placement says. The modules in the order of the pipeline:
``copying``, ``expand``, ``graph_facts``, ``sites``, ``streams`` (with ``canonical``, ``axes``, ``rules``,
``composed_sources``), ``placement``, ``rewrite`` (with ``centering``), ``materialize``; ``verdicts``, ``decisions`` and
``provenance`` put it in words.
"""
