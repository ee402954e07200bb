from hwfuse.testing import parity_tests

test_parity = parity_tests("acme")
