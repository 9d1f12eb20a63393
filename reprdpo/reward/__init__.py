"""The reward read from hidden states: probes, gate, taps, fitting and updating."""
