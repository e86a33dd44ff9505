"""Testing two compilations of a model against each other on live requests: :class:`lncompile.ABTest`."""

from lncompile.abtest.buckets import rounded_shape_bucket, shape_bucket
from lncompile.abtest.experiment import ABTest
from lncompile.abtest.results import Outcome, Verdict
from lncompile.abtest.statistics import Interval

__all__ = ["ABTest", "Interval", "Outcome", "Verdict", "rounded_shape_bucket", "shape_bucket"]
