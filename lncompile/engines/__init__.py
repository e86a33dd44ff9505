"""Folding inside of engines that load checkpoints by themselves: weights are centered as they stream in."""
