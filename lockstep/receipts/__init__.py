"""Receipts: what an answer was made of, bound so that one prefill can verify it. See docs/receipts.md."""
