"""Hosts that hwfuse can put its ops into: import the one you need, none is imported here."""
