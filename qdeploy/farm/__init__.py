"""Runs of compiled artifacts on devices: a process of this machine, and the servers behind an RPC tracker of TVM's."""
