"""Measuring a bundle on the user's own data.

Example::

    from owl2 import Owl2
    from owl2.runtime.evaluation import Subject, measure, read_items, summarise

    subject = Subject.of(Owl2.load("bundle/"), "bundle")
    measured = list(measure(subject, read_items(Path("questions.jsonl"))))
    print(summarise(measured).to_json())
"""

from owl2.runtime.evaluation.data import Item, read_items
from owl2.runtime.evaluation.divergence import Divergence, divergence
from owl2.runtime.evaluation.measure import Measured, measure
from owl2.runtime.evaluation.subject import Subject, open_reference
from owl2.runtime.evaluation.summary import Summary, summarise

__all__ = [
    "Divergence",
    "Item",
    "Measured",
    "Subject",
    "Summary",
    "divergence",
    "measure",
    "open_reference",
    "read_items",
    "summarise",
]
