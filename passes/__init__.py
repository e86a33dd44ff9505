"""Graph in, decisions and a rewritten graph out.

The rooms in the order of the pipeline: ``graph`` (operations, axes, facts), ``norms`` (the LayerNorms), ``rules`` (how
centering passes an operation), ``placement`` (what is centered where), ``rewrites`` (carrying it out), ``verdicts``
(the decisions in words), ``pipeline`` (all of them as named passes in one list: ``pipeline/order.py`` is where to begin
reading). ``decisions`` holds the words that all of them use, ``switches`` the names of passes that can be switched off.
Detection touches no weight, and a rewrite changes only what a placement says.
"""
