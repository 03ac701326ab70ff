"""Criteria of other papers, one file each. Where published code is wrong, the corrected form stands here."""
