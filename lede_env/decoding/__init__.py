"""Decoding: the loop over rounds and the strategies that steer it."""
