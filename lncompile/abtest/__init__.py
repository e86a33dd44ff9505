"""Testing two compilations of a model against each other on live requests: :class:`lncompile.ABTest`."""

from lncompile.abtest.buckets import rounded_shape_bucket, shape_bucket
from lncompile.abtest.experiment import ABTest
from lncompile.abtest.results import Conclusion, Outcome
from lncompile.abtest.statistics import Interval

__all__ = ["ABTest", "Conclusion", "Interval", "Outcome", "rounded_shape_bucket", "shape_bucket"]
