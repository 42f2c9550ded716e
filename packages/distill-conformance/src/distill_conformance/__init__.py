"""Suites of tests that a model family or a method of another package runs with pytest."""

from distill_conformance.adapter_case import AdapterCase
from distill_conformance.adapter_suite import AdapterSuite
from distill_conformance.failures import ConformanceError, NotApplicable
from distill_conformance.method_case import MethodCase
from distill_conformance.method_suite import MethodSuite

__all__ = [
    "AdapterCase",
    "AdapterSuite",
    "ConformanceError",
    "MethodCase",
    "MethodSuite",
    "NotApplicable",
]
