"""The way to compile a graph, chosen by measurement (``lnfold.select="measure"``).

A model of costs cannot know what a fold, an absorbed affine or a deferred scale is worth on the user's machine. That
machine can: a few ways to compile the graph (:mod:`.candidates`), stock among them, are timed with the inputs of the
call that it is compiled for (:mod:`.race`), once; the result is kept on disk (:mod:`.kept`).
"""
