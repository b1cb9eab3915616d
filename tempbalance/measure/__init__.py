"""Measure: layers in, one record a layer out; nothing is kept."""

from tempbalance.measure.measurement import DEFAULT_BUDGET as DEFAULT_BUDGET
from tempbalance.measure.measurement import measure as measure
from tempbalance.measure.records import LayerRecord as LayerRecord
from tempbalance.measure.records import MeasurementError as MeasurementError
from tempbalance.measure.records import Outcome as Outcome
