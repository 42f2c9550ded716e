"""Suites of tests that a model family or a method of another package runs with pytest."""

from distill_conformance.adapter_case import AdapterCase
from distill_conformance.adapter_suite import AdapterSuite
from distill_conformance.failures import ConformanceError, NotApplicable

__all__ = ["AdapterCase", "AdapterSuite", "ConformanceError", "NotApplicable"]
