"""Measure: layers in, one record a layer out; nothing is kept between measurements.

``method`` says how, ``measurement`` is one measurement in three phases, ``engine`` what it does on
one device, ``records`` what comes out, ``ranks`` who does what where several share it. ``attempt``
and ``snapshot`` leave out layers that fail, now or later in a thread; ``null`` simulates random
matrices of the same shapes, ``twins`` says what alphas beside theirs mean. Imports ``layers``,
``spectra`` and ``words``; ``balance``, ``analysis`` and what lies above them import from here.

A newcomer adds a number of a layer in ``records`` (and where it is made, ``spectra.table``), an
outcome with its meaning and its cure in ``records.Outcome``.
"""

from tempbalance.measure.measurement import measure as measure
from tempbalance.measure.method import DEFAULT_BUDGET as DEFAULT_BUDGET
from tempbalance.measure.records import LayerRecord as LayerRecord
from tempbalance.measure.records import MeasurementError as MeasurementError
from tempbalance.measure.records import Outcome as Outcome
