"""Every private torch name this project uses, in one place, each with what it is for.

Nothing outside this module may import or spell a name of torch that starts with an underscore (a test checks it), so
that a new torch release is ported by reading this file. It imports nothing of ours.
"""
